"""Small hand-written decoders, ordinary ones and traps, and what a compiler must make of each."""

from __future__ import annotations

from dataclasses import dataclass

from . import attention, layouts, lengths, masks, mixing, positions, styles
from .frame import Decoder, PositionedDecoder, RotaryDecoder

RIGHT = "right"
DECLINED = "declined"
EITHER = "right-or-declined"


@dataclass(frozen=True)
class Entry:
    """One decoder and the verdict that is expected of it.

    Attributes:
        decoder: the class; ``decoder(seed)`` makes the network, in eval mode, float32.
        expectation: "right" (an incremental form exists and must be found), "declined" (it must
            be refused) or "right-or-declined". Wrong logits are never acceptable.
        reason: what the refusal has to mention, any one of the words, when it must come.
        trap: whether a rewrite that does not prove itself would be silently wrong here.
        multiple: lengths must be a multiple of this for the forward to run at all.
    """

    decoder: type[Decoder]
    expectation: str
    reason: tuple[str, ...] = ()
    trap: bool = False
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.expectation not in (RIGHT, DECLINED, EITHER):
            raise ValueError(
                f"{self.name}: expectation {self.expectation!r}: known are "
                f"{RIGHT}, {DECLINED}, {EITHER}"
            )

    @property
    def name(self) -> str:
        return self.decoder.__name__

    @property
    def takes_position_ids(self) -> bool:
        return issubclass(self.decoder, PositionedDecoder)


def _right(*decoders: type[Decoder]) -> tuple[Entry, ...]:
    return tuple(Entry(decoder, RIGHT) for decoder in decoders)


def _either(*decoders: type[Decoder], trap: bool = False) -> tuple[Entry, ...]:
    return tuple(Entry(decoder, EITHER, trap=trap) for decoder in decoders)


def _trap(decoder: type[Decoder], *reason: str, multiple: int = 1) -> Entry:
    return Entry(decoder, DECLINED, reason, trap=True, multiple=multiple)


ORDINARY: tuple[Entry, ...] = (
    *_right(
        Decoder,
        attention.SdpaArangeMask,
        attention.SdpaTrilMask,
        attention.SdpaFloatMask,
        attention.SdpaSquareSubsequentMask,
        attention.SdpaDropoutInEval,
        attention.TrilBuffer,
        attention.BoolTrilBufferSdpa,
        attention.TriuAdditive,
        attention.FinfoMinFill,
        attention.WhereMask,
        attention.WhereTensorMask,
        attention.OneMinusMask,
        attention.LogicalNotMask,
        attention.FlippedComparison,
        attention.ShiftedComparison,
        attention.MaskThenScale,
        attention.ExpandedTwoDimensionalMask,
        attention.SharedMask,
        attention.PositionIdsMask,
        attention.EinsumAttention,
        attention.BmmAttention,
        attention.BaddbmmAttention,
        attention.KeyPermuted,
        attention.ScaledQuery,
        attention.ScaledOnBothSides,
        attention.Unscaled,
        attention.ScoreSoftcap,
        attention.UpcastSoftmax,
        attention.SoftmaxDtype,
        attention.GroupedExpand,
        attention.GroupedInterleave,
        attention.GroupedBeforeTranspose,
        attention.GroupedNative,
        attention.MultiQuery,
        attention.MultiQuerySdpa,
        attention.WideValues,
        attention.WideValuesSdpa,
        attention.ValuesAreKeys,
        attention.CrossLayerKeyValue,
        attention.SlidingArange,
        attention.SlidingInclusive,
        attention.SlidingTriu,
        attention.SlidingLong,
        attention.SlidingAlternate,
        attention.QueryKeyNorm,
        attention.PositionTemperature,
        layouts.FusedSplit,
        layouts.FusedChunk,
        layouts.FusedUnbind,
        layouts.FusedByHead,
        layouts.FlatMlp,
        layouts.FlatProjections,
        layouts.GatedMlp,
        layouts.ParallelBlock,
        layouts.PostNorm,
        layouts.TiedHead,
        layouts.LogitSoftcap,
        layouts.DropoutModules,
        layouts.OneHotExperts,
        layouts.LatentKeyValue,
        positions.NoPositions,
        positions.SlicedTable,
        positions.SlicedTable3d,
        positions.NarrowedTable,
        positions.OffsetSlice,
        positions.CumsumOfOnes,
        positions.CumsumOfAttentionMask,
        positions.OnesLikeCumsum,
        positions.OffsetArange,
        positions.ExpandedArange,
        positions.PositionIds,
        positions.OffsetPositionIds,
        positions.ClampedPositions,
        positions.Sinusoids,
        positions.SinusoidBuffer,
        RotaryDecoder,
        positions.RotaryPositionIds,
        positions.RotaryPartial,
        positions.RotaryDoubled,
        positions.RotaryOuter,
        positions.RotaryTables,
        positions.RotaryGathered,
        styles.LlamaTables,
        styles.NanoGpt,
    ),
    *_either(
        attention.TransposedScores,
        attention.LearnedTemperature,
        attention.HandSoftmax,
        attention.LogSoftmaxExp,
        attention.MaskedThenRenormalised,
        attention.GroupedTiled,
        attention.GroupedFiveDimensional,
        attention.MultiheadModule,
        attention.SinkLogit,
        attention.SoftmaxPlusOne,
        attention.DifferentialAttention,
        layouts.TimeFirst,
        layouts.ChannelFirst,
        layouts.BatchNormInEval,
        layouts.BatchFlipped,
        layouts.BatchFlippedPositionIds,
        layouts.AttentionOverBatch,
        layouts.AttentionOverHeads,
        layouts.WindowByHead,
        positions.StridedSlice,
        positions.FlippedTable,
        positions.GatheredTable,
        positions.SelectedTable,
        positions.PeriodicPositions,
        positions.ParityGate,
        positions.NegativeWrap,
        positions.OneHotPositions,
        positions.RotaryComplex,
        positions.RotaryComplexTable,
        positions.RotaryCached,
        masks.ConstantMemory,
        masks.KeysOfOthers,
        lengths.BatchBranch,
        lengths.WrappedNegative,
    ),
)

TRAPS: tuple[Entry, ...] = (
    *_either(
        positions.EyePositions,
        positions.FlatArangeModulo,
        masks.SinksAndWindow,
        masks.Alibi,
        masks.AlibiByKey,
        masks.AlibiSdpa,
        masks.RelativeBias,
        masks.ChunkedCausalMask,
        masks.DilatedMask,
        masks.CausalWhenShort,
        masks.TriangleFromTheEnd,
        masks.LearnedPrefixKeys,
        masks.WeightsReadTwice,
        masks.TalkingHeads,
        masks.TalkingScores,
        masks.TopScores,
        masks.PackedPositions,
        mixing.TriangularSoftmax,
        lengths.RelativeToFirst,
        lengths.IndexBesidePositionIds,
        lengths.PositionSteps,
        lengths.PositionSum,
        lengths.TableShort,
        lengths.TableShortSliced,
        lengths.TableShortPositionIds,
        lengths.TableShortRotary,
        lengths.LengthBranch,
        lengths.LateBranch,
        lengths.CentredScaling,
        lengths.CumulatedTable,
        trap=True,
    ),
    _trap(mixing.CausalConvolution, "conv"),
    _trap(mixing.TrimmedConvolution, "conv"),
    _trap(mixing.CausalPooling, "pool"),
    _trap(mixing.ShiftByPad, "pad"),
    _trap(mixing.ShiftByRoll, "roll"),
    _trap(mixing.ShiftByZeros, "cat", "slice"),
    _trap(mixing.ShiftKeys, "roll"),
    _trap(mixing.ShiftValues, "pad"),
    _trap(mixing.NextTokenPeek, "slice", "pad"),
    _trap(mixing.Bigram, "pad", "slice"),
    _trap(mixing.BigramByGather, "gather"),
    _trap(mixing.RunningSum, "cumsum"),
    _trap(mixing.RunningMean, "cumsum"),
    _trap(mixing.RunningMaximum, "cummax"),
    _trap(mixing.RunningLogSum, "logcumsumexp"),
    _trap(mixing.TriangularMean),
    _trap(mixing.MovingAverage),
    _trap(mixing.LearnedTokenMixing),
    _trap(mixing.FirstTokenEverywhere, "slice"),
    _trap(mixing.LastTokenEverywhere, "slice"),
    _trap(mixing.MeanSubtracted, "mean"),
    _trap(mixing.SqueezeAndExcite, "sum"),
    _trap(mixing.MaximumGate, "amax"),
    _trap(mixing.LargestTokenGate, "max"),
    _trap(mixing.TokensNormalised, "norm"),
    _trap(mixing.TokensAndChannelsNormalised, "layer_norm"),
    _trap(mixing.GroupNormOverTokens, "norm"),
    _trap(mixing.InstanceNormOverTokens, "mean", "std"),
    _trap(mixing.BatchNormOfTheBatch, "batch_norm", "pad"),
    _trap(mixing.KeysNormalisedOverTokens, "norm"),
    _trap(mixing.SoftmaxOverTokens, "softmax"),
    _trap(mixing.SortedTokens, "sort"),
    _trap(mixing.ExpertChoice, "topk"),
    _trap(mixing.FourierMixing, "fft"),
    _trap(mixing.GatedRecurrence, "gru"),
    _trap(mixing.PythonLoop, "token"),
    _trap(mixing.LinearAttention, "cumsum"),
    _trap(mixing.LinearAttentionMatrix, "tril", "matmul"),
    _trap(mixing.Retention, "mul", "matmul"),
    _trap(mixing.ReluAttention, "relu", "tril", "matmul"),
    _trap(mixing.SigmoidAttention, "sigmoid", "tril", "matmul"),
    _trap(mixing.ChunkedPairs, "view", multiple=2),
    _trap(mixing.PooledPairs, "reshape", "view", multiple=2),
    _trap(mixing.HalvesExchanged, "slice", "cat"),
    _trap(mixing.UnfoldedWindows, "unfold", "pad"),
    _trap(mixing.EveryOtherToken, "slice"),
    _trap(mixing.NeighbourByIndex, "index"),
    _trap(mixing.ReversedByIndex, "index_select"),
    _trap(mixing.FlippedStream, "flip"),
    _trap(mixing.ScrambledBatchAndTokens, "reshape", "view"),
    _trap(mixing.ScrambledChannels, "reshape", "view"),
    _trap(mixing.ForgottenTranspose, "reshape", "view"),
    _trap(mixing.ForgottenHeadTranspose, "view"),
    _trap(mixing.OuterTokens, "matmul"),
    _trap(mixing.SameTokenCount, "eq", "tril", "sum"),
    _trap(mixing.CallCounter, "buffer", "add_"),
    _trap(mixing.LastLogitsOnly, "logits", "slice"),
    _trap(mixing.LogitsNormalisedOverTokens, "log_softmax"),
    _trap(mixing.LogitsSummed, "cumsum"),
    _trap(masks.Bidirectional, "full"),
    _trap(masks.BidirectionalSpelled, "full"),
    _trap(masks.BidirectionalLastLayer, "full"),
    _trap(masks.AntiCausal, "mask"),
    _trap(masks.OneAhead, "mask"),
    _trap(masks.PrefixMask, "mask"),
    _trap(masks.ChunkedMask, "mask"),
    _trap(masks.StrictlyPast, "mask"),
    _trap(masks.HalfLengthWindow, "mask"),
    _trap(masks.DoubledRow, "mask"),
    _trap(masks.FlawedTriangle, "mask"),
    _trap(masks.ShiftedTriangle, "mask"),
    _trap(masks.PaddingMask, "mask"),
    _trap(masks.DocumentMask, "mask"),
    _trap(masks.SameTokenMask, "mask"),
    _trap(masks.AbsoluteBias, "mask"),
    _trap(masks.SoftMask, "mask"),
    _trap(masks.FilledWithZero, "mask"),
    _trap(masks.MultipliedMask, "mask", "softmax", "mul"),
    _trap(masks.MaskedAfterSoftmax, "tril", "full"),
    _trap(masks.SoftmaxOverQueries, "softmax"),
    _trap(masks.SoftmaxOverHeads, "softmax"),
    _trap(masks.ScaledByLength, "length", "token"),
    _trap(masks.ScaledByLengthSdpa, "length", "token"),
    _trap(masks.LogLengthTemperature, "length", "token", "log"),
    _trap(masks.CentredScores, "mean"),
    _trap(masks.CentredKeys, "mean"),
    _trap(masks.ValueMeanAdded, "mean"),
    _trap(masks.ReceivedAttention, "sum"),
    _trap(masks.ZeroKey, "pad"),
    _trap(masks.QueriesOfTheSecondHalf, "slice"),
    _trap(masks.KeysOfTheFirstHalf, "slice"),
    _trap(masks.FirstKeysOnly, "slice"),
    _trap(masks.PositionWindowFromTheEnd, "slice", "mask"),
    _trap(lengths.CountedFromTheEnd, "length", "token"),
    _trap(lengths.ReversedArange, "arange"),
    _trap(lengths.FlippedArange, "flip"),
    _trap(lengths.FlippedCumsum, "flip"),
    _trap(lengths.RolledArange, "roll"),
    _trap(lengths.FlatArange, "arange", "view"),
    _trap(lengths.SortedArange, "sort"),
    _trap(lengths.Linspace, "linspace"),
    _trap(lengths.FractionOfLength, "length", "token"),
    _trap(lengths.FractionOfLast, "max"),
    _trap(lengths.CentredPositions, "mean"),
    _trap(lengths.RelativeToLast, "slice"),
    _trap(lengths.SkipsPadding, "cumsum"),
    _trap(lengths.RestartsAtSeparator, "cummax"),
    _trap(lengths.TableFromTheEnd, "slice"),
    _trap(lengths.TableByLength, "slice"),
    _trap(lengths.TableSliceFlipped, "flip"),
    _trap(lengths.TableInterpolated, "upsample", "interpolate"),
    _trap(lengths.TableCentred, "mean"),
    _trap(lengths.LengthAsScale, "length", "token"),
    _trap(lengths.LengthAsData, "length", "token", "full"),
    _trap(lengths.LengthByCounting, "sum"),
    _trap(lengths.LengthWhere, "length", "token", "full"),
    _trap(lengths.LateContent, "slice"),
    _trap(lengths.DynamicRotary, "length", "token"),
    _trap(lengths.DynamicRotaryByData, "max"),
    _trap(lengths.LoopedSinusoids, "token"),
    _trap(lengths.ConvolvedPositions, "conv"),
    _trap(lengths.SoftmaxedTable, "softmax"),
    _trap(lengths.ScaledEmbedding, "length", "token"),
)

DECODERS: tuple[Entry, ...] = ORDINARY + TRAPS

__all__ = ["DECLINED", "DECODERS", "EITHER", "ORDINARY", "RIGHT", "TRAPS", "Decoder", "Entry"]
