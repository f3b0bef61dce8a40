/* The part of the CUDA driver's API that the kernel loader uses, over host memory: what is called is
 * written to $FAKE_LOG, a line of JSON a call. $FAKE_DEVICE is the compute capability, as 80.
 * $FAKE_PARAMETERS tells what an entry takes: "entry=ppif;..." (pointer, int32, float), since a
 * launch does not. $FAKE_ONES names an entry, the parameter that it writes ones to, and how many. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static FILE *log_file(void) {
    static FILE *file;
    if (!file) file = fopen(getenv("FAKE_LOG"), "w");
    setbuf(file, NULL);
    return file;
}

typedef struct { char image[5]; int size; } module;
typedef struct { char entry[256]; } function;

int cuInit(unsigned flags) { (void)flags; return 0; }
int cuDeviceGetCount(int *count) { *count = atoi(getenv("FAKE_DEVICE")) ? 1 : 0; return 0; }
int cuDeviceGet(int *device, int at) { *device = at; return 0; }
int cuDeviceGetName(char *name, int room, int device) {
    (void)device;
    snprintf(name, (size_t)room, "no device");
    return 0;
}
int cuDeviceGetAttribute(int *value, int which, int device) {
    int capability = atoi(getenv("FAKE_DEVICE"));
    (void)device;
    if (which != 75 && which != 76) return 1;
    *value = which == 75 ? capability / 10 : capability % 10;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    (void)device;
    *context = (void *)1;
    return 0;
}
int cuCtxSetCurrent(void *context) { return context ? 0 : 201; }
int cuCtxSynchronize(void) { return 0; }
int cuGetErrorString(int error, const char **text) {
    *text = error == 209 ? "no binary for this device" : "a fake error";
    return 0;
}
int cuModuleLoadData(void **made, const void *image) {
    const unsigned char *bytes = image;
    int elf = memcmp(bytes, "\177ELF", 4) == 0;
    int refused = elf && getenv("FAKE_REFUSE") != NULL;
    fprintf(log_file(), "{\"call\": \"load\", \"elf\": %s, \"text\": %s}\n", elf ? "true" : "false",
            !elf && strstr(image, ".version") ? "true" : "false");
    if (refused) return 209;
    *made = malloc(1);
    return 0;
}
int cuModuleGetFunction(void **made, void *from, const char *entry) {
    function *found = malloc(sizeof *found);
    (void)from;
    snprintf(found->entry, sizeof found->entry, "%s", entry);
    fprintf(log_file(), "{\"call\": \"function\", \"entry\": \"%s\"}\n", entry);
    *made = found;
    return 0;
}
int cuFuncSetAttribute(void *of, int which, int value) {
    (void)of;
    fprintf(log_file(), "{\"call\": \"attribute\", \"which\": %d, \"value\": %d}\n", which, value);
    return 0;
}
int cuMemAlloc_v2(uint64_t *made, size_t bytes) {
    *made = (uint64_t)(uintptr_t)aligned_alloc(256, (bytes + 255) / 256 * 256);
    fprintf(log_file(), "{\"call\": \"allocate\", \"bytes\": %zu, \"at\": %llu}\n", bytes,
            (unsigned long long)*made);
    return 0;
}
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) {
    memcpy((void *)(uintptr_t)to, from, bytes);
    return 0;
}
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) {
    memcpy(to, (void *)(uintptr_t)from, bytes);
    return 0;
}
int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
    memcpy((void *)(uintptr_t)to, (void *)(uintptr_t)from, bytes);
    return 0;
}

static const char *kinds_of(const char *entry) {
    const char *told = getenv("FAKE_PARAMETERS");
    size_t length = strlen(entry);
    while (told && *told) {
        if (!strncmp(told, entry, length) && told[length] == '=') return told + length + 1;
        told = strchr(told, ';');
        if (told) told++;
    }
    return "";
}

int cuLaunchKernel(void *of, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **parameters, void **extra) {
    function *launched = of;
    char ones[256] = "";
    int at = 0, count = 0;
    (void)stream;
    fprintf(log_file(),
            "{\"call\": \"launch\", \"entry\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], "
            "\"shared\": %u, \"extra\": %s, \"values\": [",
            launched->entry, gx, gy, gz, bx, by, bz, shared, extra ? "true" : "false");
    const char *kinds = kinds_of(launched->entry);
    for (int i = 0; kinds[i] && kinds[i] != ';'; i++) {
        if (i) fprintf(log_file(), ", ");
        if (kinds[i] == 'p')
            fprintf(log_file(), "%llu", *(unsigned long long *)parameters[i]);
        else if (kinds[i] == 'i')
            fprintf(log_file(), "%d", *(int32_t *)parameters[i]);
        else
            fprintf(log_file(), "%.9g", (double)*(float *)parameters[i]);
    }
    fprintf(log_file(), "]}\n");
    if (getenv("FAKE_ONES") && sscanf(getenv("FAKE_ONES"), "%255s %d %d", ones, &at, &count) == 3 &&
        !strcmp(ones, launched->entry)) {
        float *out = *(float **)parameters[at];
        for (int i = 0; i < count; i++) out[i] = 1;
    }
    return 0;
}
