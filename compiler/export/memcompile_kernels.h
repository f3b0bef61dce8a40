/* What the kernels.h of a target are made of: operators, how they are launched, and with what.
 *
 * C99 and C++. An operator takes tensors and numbers; its sizes stand in one array of int64_t, in
 * the order of `sizes`: those that are given first, strides in elements among them, then those that
 * `derive` computes. Of its variants the first that `holds` is carried out, step by step.
 */
#ifndef MEMCOMPILE_KERNELS_H
#define MEMCOMPILE_KERNELS_H

#include <math.h>
#include <stdint.h>

#define MEMC_MOST_AXES 5

typedef int64_t (*memc_formula)(const int64_t *sizes);

typedef enum { MEMC_BF16, MEMC_FP16, MEMC_FP32, MEMC_I32 } memc_type;

typedef struct {
    const char *name;
    memc_type type;
    int written; /* an argument that the operator changes in place */
    int axes;
    memc_formula shape[MEMC_MOST_AXES];
    memc_formula strides[MEMC_MOST_AXES]; /* null: contiguous */
} memc_tensor;

typedef enum { MEMC_TENSOR, MEMC_SIZE, MEMC_NUMBER } memc_source;

/* What a parameter of a kernel is given. */
typedef struct {
    const char *name;
    memc_source source;
    int at;            /* among the operator's tensors, or its numbers */
    memc_formula size; /* an int32_t */
    int multiple_of;   /* bytes of a pointer, elements of a stride: what it must be divisible by */
} memc_parameter;

typedef struct {
    const char *name;
    const char *entry;
    const char *binary;   /* a file: cubin or hsaco */
    const char *assembly; /* a file: PTX or AMD assembly */
    const char *written_for;
    int threads;
    int shared;          /* bytes of dynamic shared memory */
    int null_parameters; /* pointers behind the others, all null */
    int registers;
} memc_kernel;

typedef enum { MEMC_ALLOCATE, MEMC_COPY, MEMC_LAUNCH } memc_action;

typedef struct {
    memc_action action;
    int tensor;  /* allocated, or copied from */
    int target;  /* copied to */
    int fill;    /* whether what is allocated is filled with `value` */
    float value;
    int kernel;
    memc_formula grid[3];
    int parameter_count;
    const memc_parameter *parameters;
} memc_step;

typedef struct {
    int (*holds)(const int64_t *sizes);
    void (*derive)(int64_t *sizes);
    int step_count;
    const memc_step *steps;
} memc_variant;

typedef struct {
    const char *name;
    int size_count;
    int given_count; /* the first of the sizes; the others are derived */
    const char *const *sizes;
    int tensor_count;
    int argument_count; /* the first of the tensors; the others are allocated */
    const memc_tensor *tensors;
    int number_count;
    const char *const *numbers; /* float */
    int return_count;
    const int *returns; /* among the tensors */
    int variant_count;
    const memc_variant *variants;
} memc_operator;

typedef struct {
    const char *name;   /* "cuda:sm_90" */
    const char *folder; /* "cuda-sm_90" */
    int capability;     /* 90; 0 for AMD */
    int operator_count;
    const memc_operator *operators;
    int kernel_count;
    const memc_kernel *kernels;
} memc_target;

static inline int64_t memc_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t memc_min(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
