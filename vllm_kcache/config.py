# SPDX-License-Identifier: Apache-2.0
"""Configuration of the split cache: what a user may set, and what it means for one model."""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_kcache.types import HeadCombine, Selection, Tail

if TYPE_CHECKING:
    import torch

    from vllm_kcache.cache.formats import HostDtype

KEY_PREFIX = "kcache_config"
# At 2K to 8K tokens the perplexity is within .4%, below 500 tokens a head (docs/accuracy.md).
DEFAULT_MASS_THRESHOLD = 0.002
# What it is for; for blocks of other sizes it changes in proportion.
DEFAULT_THRESHOLD_V_BLOCK_TOKENS = 8
# With one threshold at any length what lists leave out grows (docs/selection.md).
DEFAULT_THRESHOLD_LENGTH = 8192

# What the threshold is for: larger blocks take a quarter more tokens (docs/selection.md).
V_BLOCK_TOKENS_AUTO = 8
V_BLOCK_TOKENS_LEAST = 4
# The smallest row that reads mapped host memory at the full speed of the link; larger blocks gain
# nothing there.
V_BLOCK_BYTES = 2048
V_BLOCK_TOKENS_ACCEPTED = (1, 2, 4, 8, 16, 32)

# Far above any context; sums and products of a few of them with a V block stay below 2**31, as the
# kernels need them.
MOST_COUNT = 2**24
# Far below the mass of a token in the longest context; half of it is a float32 above 0.
LEAST_SHARE = 1e-9
# A pebibyte. In bytes it is an integer that every part takes.
MOST_GIB = 2**20

ACCEPTED_VALUES = {
    "top_n": f'an integer from 1 to {MOST_COUNT}, "all" or null',
    "coverage": 'a number from 1e-9 to 1, null or "auto"',
    "mass_threshold": 'a number from 1e-9 to 1, null or "auto"',
    "threshold_length": f'an integer from 1 to {MOST_COUNT}, null or "auto"',
    "k_bits": '4, 16 or "auto"',
    "host_dtype": '"auto", "model" or "int8"',
    "v_block_tokens": '1, 2, 4, 8, 16, 32 or "auto"',
    "sink_tokens": f"an integer from 0 to {MOST_COUNT}",
    "recent_tokens": f"an integer from 1 to {MOST_COUNT}",
    "dense_layers": (
        f"an integer from 0 to {MOST_COUNT} (count from the bottom) or a list of layer numbers"
    ),
    "tail": '"auto", "renormalize" or "clip"',
    "head_combine": '"auto", "sum" or "max"',
    "host_memory_gib": f'a number greater than 0 and at most {MOST_GIB}, or "auto"',
    "hot_cache_gib": f'a number from 0 to {MOST_GIB}, or "auto"',
    "prefill": '"auto", "flash_attn", "xformers" or "torch"',
}
# Characters of a value in a message.
_MOST_SHOWN = 200

PositiveInt = Annotated[int, Field(strict=True, ge=1, le=MOST_COUNT)]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0, le=MOST_COUNT)]
Fraction = Annotated[float, Field(strict=True, ge=LEAST_SHARE, le=1, allow_inf_nan=False)]
PositiveGiB = Annotated[float, Field(strict=True, gt=0, le=MOST_GIB, allow_inf_nan=False)]
NonNegativeGiB = Annotated[float, Field(strict=True, ge=0, le=MOST_GIB, allow_inf_nan=False)]


class KCacheConfigError(ValueError):
    """A key or value of the configuration that is not accepted. The message names all three."""


class KCacheConfig(BaseModel):
    """What a user may set, as JSON in `--kcache-config` or as a dict. Everything has a default.

    Which V blocks a decode step attends follows from `top_n` and `coverage` together, or from
    `top_n` and `mass_threshold`:

    | top_n | coverage | selected, per request and KV head |
    |---|---|---|
    | not given | not given | every block that holds .002 of the mass of one query head (of 8
      tokens; in proportion of others; less beyond `threshold_length`) |
    | "all" | not given | every block: equal to full attention |
    | N | not given | the N blocks of most mass (the paper's mode, arXiv 2404.18057) |
    | not given or "all" | c | the fewest blocks that reach coverage c |
    | N | c | the fewest blocks that reach coverage c, at most N |
    | not given or "all" | null | every block |
    | N | null | the N blocks of most mass |
    | not given, "all" or N | not given or null, and mass_threshold m | every block that holds at
      least m of the softmax mass of one query head; at most N |
    | not given or "all" | not given, and mass_threshold null | every block |

    Fields:
        top_n: most V blocks kept per KV head. `None` is "not given", `"all"` is every block.
        coverage: share of the softmax mass that the selected blocks hold. `"auto"` is "not given".
        mass_threshold: least share of the softmax mass for which a block is selected. `"auto"` is
            "not given".
        threshold_length: tokens of a request beyond which the mass threshold falls with the square
            root of the length, one that was given, too; None, at no length. `"auto"`: 8192.
        k_bits: 4, GPU pages hold K codes, by which scores are estimated, and host rows hold K
            beside V; 16, they hold K itself, which scores are of. `"auto"`: 4.
        host_dtype: with k_bits 4, the values of rows: the model's dtype, or int8. "auto": int8 for
            models of 2 bytes a value.
        v_block_tokens: tokens of a V block. `"auto"`: 8, or 2 KiB at 2 bytes a value where that is
            less.
        sink_tokens: first tokens of a request, always attended; rounded up to V blocks.
        recent_tokens: last tokens of a request, always attended; rounded out to V blocks.
        dense_layers: layers that keep K and V in GPU memory: a count from the bottom, or a list.
        tail: what happens to the mass that was not selected (see `reference/attend.py`). "auto":
            "clip" with a mass threshold, else "renormalize".
        head_combine: how the query heads of a KV head choose together (see `types.Selection`).
            "auto": "max" with a mass threshold, else "sum".
        host_memory_gib: host memory for rows, of all ranks on this machine together.
        hot_cache_gib: GPU memory for copies of rows, per rank. 0 switches the cache off.
        prefill: the kernel of exact prefill.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    top_n: PositiveInt | Literal["all"] | None = None
    coverage: Fraction | Literal["auto"] | None = "auto"
    mass_threshold: Fraction | Literal["auto"] | None = "auto"
    threshold_length: PositiveInt | Literal["auto"] | None = "auto"
    k_bits: PositiveInt | Literal["auto"] = "auto"
    host_dtype: Literal["auto", "model", "int8"] = "auto"
    v_block_tokens: PositiveInt | Literal["auto"] = "auto"
    sink_tokens: NonNegativeInt = 8
    recent_tokens: PositiveInt = 32
    dense_layers: NonNegativeInt | tuple[NonNegativeInt, ...] = 0
    tail: Literal["auto", "renormalize", "clip"] = "auto"
    head_combine: HeadCombine | Literal["auto"] = "auto"
    host_memory_gib: PositiveGiB | Literal["auto"] = "auto"
    hot_cache_gib: NonNegativeGiB | Literal["auto"] = "auto"
    prefill: Literal["auto", "flash_attn", "xformers", "torch"] = "auto"

    @field_validator("k_bits")
    @classmethod
    def _four_or_sixteen(cls, value: int | str) -> int | str:
        # A Literal of numbers would take 4.0, too.
        if value not in ("auto", 4, 16):
            raise ValueError(f"must be {ACCEPTED_VALUES['k_bits']}")
        return value

    @field_validator("v_block_tokens")
    @classmethod
    def _power_of_two(cls, value: int | str) -> int | str:
        if value != "auto" and value not in V_BLOCK_TOKENS_ACCEPTED:
            raise ValueError(f"must be {ACCEPTED_VALUES['v_block_tokens']}")
        return value

    @classmethod
    def from_user(cls, value: KCacheConfig | dict[str, Any] | str | None) -> KCacheConfig:
        """Read what a user gave: a dict, a JSON object as text, or None for the defaults.

        Raises:
            KCacheConfigError: one message for everything that is wrong, naming each key, its value
                and the accepted values.
        """
        if isinstance(value, cls):
            return value
        given = {} if value is None else value
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError) as error:
                # Beside errors of the grammar: a number of more digits than Python reads, lists
                # that are nested too deep.
                raise KCacheConfigError(
                    f"{KEY_PREFIX}={_shown(value)}: not valid JSON ({error})"
                ) from None
        if not isinstance(given, dict):
            raise KCacheConfigError(
                f"{KEY_PREFIX}={_shown(value)}: must be a JSON object (or a dict) of settings; "
                f"accepted keys: {', '.join(cls.model_fields)}"
            )
        for key in given:
            if key not in cls.model_fields:
                raise KCacheConfigError(_unknown_key_message(key, given[key]))
        try:
            config = cls.model_validate(given)
        except ValidationError as error:
            # A union reports one error per member; the user made one mistake per field.
            fields = dict.fromkeys(str(item["loc"][0]) for item in error.errors())
            messages = [_bad_value(field, given[field]) for field in fields]
            raise KCacheConfigError("; ".join(messages)) from None
        config.check_together()
        return config

    def check_together(self) -> None:
        """Raise KCacheConfigError for values that are accepted each, and not together."""
        if self.host_dtype == "int8" and self.resolved_k_bits == 16:
            raise KCacheConfigError(
                f"{KEY_PREFIX}.host_dtype='int8': needs {KEY_PREFIX}.k_bits=4; with 16 the host "
                "holds V as the model has it"
            )
        if not self.has_mass_threshold:
            if self.threshold_length not in ("auto", None):
                raise KCacheConfigError(
                    f"{KEY_PREFIX}.threshold_length={self.threshold_length}: needs "
                    f"{KEY_PREFIX}.mass_threshold, which falls beyond so many tokens"
                )
            if self.tail == "clip":
                raise KCacheConfigError(
                    f"{KEY_PREFIX}.tail='clip': needs {KEY_PREFIX}.mass_threshold, which says "
                    "where to clip"
                )
        elif isinstance(self.coverage, float):
            raise KCacheConfigError(
                f"{KEY_PREFIX}.mass_threshold={self.mass_threshold}: not together with "
                f"{KEY_PREFIX}.coverage={self.coverage}; give one of them"
            )

    def to_json_dict(self) -> dict[str, Any]:
        """The settings that were given, JSON-serialisable. `from_user` of it gives this back."""
        return self.model_dump(mode="json", exclude_unset=True)

    @property
    def resolved_top_n(self) -> int | None:
        """The cap in V blocks, or None for no cap."""
        return self.top_n if isinstance(self.top_n, int) else None

    @property
    def resolved_coverage(self) -> float | None:
        """The coverage to reach, or None where it does not decide (see the class's table)."""
        return None if self.coverage == "auto" else self.coverage

    @property
    def has_mass_threshold(self) -> bool:
        """Whether a mass threshold decides (see the class's table)."""
        return self.resolved_mass_threshold(DEFAULT_THRESHOLD_V_BLOCK_TOKENS) is not None

    def resolved_mass_threshold(self, v_block_tokens: int) -> float | None:
        """The least mass of a selected block of `v_block_tokens` tokens, or None where it does not
        decide. What the user gave is for blocks of any size."""
        if self.mass_threshold != "auto":
            return self.mass_threshold
        if self.top_n is not None or self.coverage != "auto":
            return None
        return DEFAULT_MASS_THRESHOLD * v_block_tokens / DEFAULT_THRESHOLD_V_BLOCK_TOKENS

    @property
    def resolved_threshold_length(self) -> int | None:
        """Tokens of a request beyond which the mass threshold falls, or None."""
        if self.threshold_length != "auto":
            return self.threshold_length
        return DEFAULT_THRESHOLD_LENGTH if self.has_mass_threshold else None

    @property
    def resolved_tail(self) -> Tail:
        """What happens to the mass that was not selected."""
        if self.tail != "auto":
            return self.tail
        return "clip" if self.has_mass_threshold else "renormalize"

    @property
    def resolved_k_bits(self) -> int:
        """Bits of an element of K in GPU pages. The one place that decides what "auto" means."""
        return 4 if self.k_bits == "auto" else self.k_bits

    def resolved_host_dtype(self, dtype: torch.dtype) -> HostDtype:
        """What host rows hold for a model of this dtype."""
        if self.host_dtype != "auto":
            return self.host_dtype
        return "int8" if self.resolved_k_bits == 4 and dtype.itemsize == 2 else "model"

    def resolved_v_block_tokens(self, head_size: int, itemsize: int, page_tokens: int) -> int:
        """Tokens of a V block for one model.

        Args:
            head_size: values per token and KV head.
            itemsize: bytes of a value in the cache. Above 2 the token count of 2 bytes is kept, so
                that a float32 run selects what the bf16 run selects.
            page_tokens: tokens of a K page (vLLM's block size); a V block divides it.
        Raises:
            KCacheConfigError: the V block that was asked for does not divide `page_tokens`.
            ValueError: a size below 1.
        """
        for name, value in (
            ("head_size", head_size),
            ("itemsize", itemsize),
            ("page_tokens", page_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.v_block_tokens != "auto":
            if page_tokens % self.v_block_tokens:
                accepted = [str(t) for t in V_BLOCK_TOKENS_ACCEPTED if page_tokens % t == 0]
                raise KCacheConfigError(
                    f"{KEY_PREFIX}.v_block_tokens={self.v_block_tokens}: must divide the KV block "
                    f"size of {page_tokens} tokens; accepted here: {', '.join(accepted)}"
                )
            return self.v_block_tokens
        tokens, row_bytes = V_BLOCK_TOKENS_AUTO, head_size * min(itemsize, 2)
        while tokens > V_BLOCK_TOKENS_LEAST and tokens * row_bytes > V_BLOCK_BYTES:
            tokens //= 2
        while page_tokens % tokens:
            tokens //= 2
        return tokens

    def selection(self, v_block_tokens: int) -> Selection:
        """The selection rule in V blocks of `v_block_tokens` tokens.

        Raises:
            KCacheConfigError: `top_n` is below the blocks that sink and recent force in, or
                settings exclude each other.
        """
        self.check_together()
        combine = self.head_combine
        if combine == "auto":
            combine = "max" if self.has_mass_threshold else "sum"
        selection = Selection(
            top_n=self.resolved_top_n,
            coverage=self.resolved_coverage,
            sink_blocks=-(-self.sink_tokens // v_block_tokens),
            recent_tokens=self.recent_tokens,
            combine=combine,
            mass_threshold=self.resolved_mass_threshold(v_block_tokens),
            threshold_length=self.resolved_threshold_length,
        )
        forced = selection.most_forced_blocks(v_block_tokens)
        if selection.top_n is not None and selection.top_n < forced:
            recent = selection.most_recent_blocks(v_block_tokens)
            raise KCacheConfigError(
                f"{KEY_PREFIX}.top_n={self.top_n}: must be at least {forced}, since sink_tokens="
                f"{self.sink_tokens} and recent_tokens={self.recent_tokens} always keep up to "
                f"{selection.sink_blocks} + {recent} V blocks of {v_block_tokens} tokens"
            )
        return selection

    def resolved_dense_layers(self, num_layers: int) -> frozenset[int]:
        """Layer numbers, counted from 0 at the bottom, that keep K and V in GPU memory.

        Raises:
            KCacheConfigError: a layer the model does not have, or no layer left to split.
        """
        if isinstance(self.dense_layers, int):
            layers = frozenset(range(min(self.dense_layers, num_layers)))
            shown = str(self.dense_layers)
            accepted = f"at most {num_layers - 1}"
        else:
            layers, shown = frozenset(self.dense_layers), _shown(list(self.dense_layers))
            accepted = f"layer numbers from 0 to {num_layers - 1}, and not all of them"
        if len(layers) >= num_layers or max(layers, default=0) >= num_layers:
            raise KCacheConfigError(
                f"{KEY_PREFIX}.dense_layers={shown}: must be {accepted}, since the model has "
                f"{num_layers} layers and at least one must be split"
            )
        return layers


def _shown(value: Any) -> str:
    """A value that was given, in one line that is not too long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        # Python writes no integer of more than 4,300 digits, and no list nested too deep.
        return f"<{type(value).__name__}>"
    text = text.replace("\n", " ")
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."


def _bad_value(field: str, value: Any) -> str:
    return f"{KEY_PREFIX}.{field}={_shown(value)}: must be {ACCEPTED_VALUES[field]}"


def _unknown_key_message(key: Any, value: Any) -> str:
    name = key if isinstance(key, str) and key.isidentifier() else _shown(key)
    close = difflib.get_close_matches(name[:_MOST_SHOWN], KCacheConfig.model_fields, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    accepted = ", ".join(KCacheConfig.model_fields)
    shown = name if len(name) <= _MOST_SHOWN else f"{name[:_MOST_SHOWN]}..."
    return f"{KEY_PREFIX}.{shown}={_shown(value)}: unknown key{hint}; accepted keys: {accepted}"
