"""Configuration of the quantizer."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from irqlora_jax.quant.budget import AllocationOptions, parse_budget
from irqlora_jax.quant.calibrations import CALIBRATIONS, PLAIN
from irqlora_jax.quant.calibrations.icq import IcqOptions
from irqlora_jax.quant.calibrations.joint import JointOptions
from irqlora_jax.quant.formats import FORMATS
from irqlora_jax.quant.stats import ScaleRule, ScaleType, SecondLevel
from irqlora_jax.quant.trained import ApiqOptions, BlockOptions
from irqlora_jax.text import require, shorten, with_current_names

RENAMED = {
    "search_range": ("icq", "range"),
    "search_steps": ("icq", "steps"),
    "search": ("icq", "search"),
    "error_weight": ("joint", "error_weight"),
    "refine_steps": ("joint", "refine_steps"),
}
"""Fields of version 0.1.0, and the options that replace them."""
KEPT = "none"
"""The value of `quant.format` that keeps the weights as they are."""
Rounding = Literal["nearest", "feedback"]
Training = Literal["none", "apiq", "block"]
TITLES = {"none": "", "apiq": "ApiQ", "block": "block training"}
"""Short names of the trainings, for tables."""
if TYPE_CHECKING:
    FormatName = str
    CalibrationName = str
else:
    FormatName = Literal[*FORMATS, KEPT]
    CalibrationName = Literal[*CALIBRATIONS]


@dataclasses.dataclass(frozen=True)
class QuantRule:
    """Overrides `quant` for some matrices. Null fields keep the value of `quant`."""

    example: ClassVar[str] = "[{match: PATTERN, format: nf4}]"

    match: str
    """Shell pattern for the names of the matrices (*, ?, [0-3]). A name is
    layers.LAYER.self_attn.PROJECTION or layers.LAYER.mlp.PROJECTION, with layers counted from 0.
    "layers.0.*" is the first layer, "*.down_proj" one projection of all layers."""
    format: FormatName | None = None
    """Code book. "none" keeps these matrices as they are."""
    block_size: int | None = None
    """Weights that share a scale and a shift."""
    calibration: CalibrationName | None = None
    """How scales and shifts are chosen."""
    rounding: Rounding | None = None
    """How codes are chosen."""
    symmetric: bool | None = None
    """Fix the zero point, or leave the shift out."""
    outliers: float | None = None
    """Share of the weights that keep 16 bits."""
    scale_rule: ScaleRule | None = None
    """How scales and shifts are stored."""
    scale_bits: int | None = None
    """Bits of a stored scale or shift."""
    scale_group: int | None = None
    """Blocks that share a maximum."""
    scale_dtype: ScaleType | None = None
    """Type of the maxima."""

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields that are not null."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["match"]
        return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How the frozen linear layers are stored."""

    format: FormatName = "nf4"
    """Code book. "none" keeps the weights as they are (plain LoRA)."""
    block_size: int = 64
    """Weights that share a scale and a shift; a multiple of 8."""
    scale_rule: ScaleRule = "dynamic"
    """How scales and shifts are stored (the second level). "dynamic": 8-bit floating-point numbers
    around the mean of the scales (QLoRA). "uniform": evenly spaced numbers above the smallest scale
    of the matrix (LQ-LoRA), which can have fewer bits."""
    scale_bits: int = 8
    """Bits of a stored scale or shift: 8, or 2 to 8 with `scale_rule` uniform. Zero points always
    have 8."""
    scale_group: int = 256
    """Blocks whose scales share a maximum, 16 to 256; the same for shifts."""
    scale_dtype: ScaleType = "float32"
    """Type of these maxima."""
    calibration: CalibrationName = "icq"
    """"none": the largest weight determines the scale. "icq": choose the shift (NormalFloat, FP4)
    or range (integers) that maximizes the entropy of each block's codes (IR-QLoRA, section 3.2).
    "joint": choose the scale and shift that maximize entropy - error_weight * error / variance.
    "robust": choose the scale and shift of least error, where the largest and the smallest weights
    of a block count more. "importance": choose the scale and shift of least error, where weights
    with larger inputs count more; needs `calibrate.data`. "gptq": as "none", with rounding
    "feedback". Formats of 8 bits take "none" or "gptq"."""
    rounding: Rounding = "nearest"
    """How codes are chosen, for all calibrations. "nearest": the level nearest to each weight.
    "feedback": one column after the other, and the later columns correct the error of the earlier
    ones for typical inputs (GPTQ); needs `calibrate.data`."""
    training: Training = "none"
    """Train each decoder layer, so that its outputs come close to those in full precision; needs
    `calibrate.data`, and takes long. "apiq": the range of every block (ApiQ). "block": weights,
    scales and shifts (EfficientQAT). Both also train the pairs of an `adapter.init` that is not
    "default"."""
    symmetric: bool = False
    """Integers: fix the zero point in the middle of the codes. NormalFloat and FP4, with
    calibration joint, robust or importance: choose the scales alone and store no shifts, as
    bitsandbytes needs it. The plain quantizer has none in any case."""
    outliers: float = 0.0
    """Share of the weights of each matrix that keep 16 bits, at least 0 and below 0.5: 0.01 costs
    0.32 bits a weight. They are chosen before the calibration, and `quant.training` keeps them."""
    outlier_rule: Literal["magnitude", "sensitivity"] = "magnitude"
    """The weights that are outliers. "magnitude": the largest (AdpQ). "sensitivity": those whose
    quantization would harm the outputs most (SpQR); needs `calibrate.data`."""
    codes_from: Literal["stored", "exact"] = "stored"
    """Scale and shift for computing the codes. "stored": rounded, as the dequantizer uses them.
    "exact": before rounding, as in the released code (for parity only)."""
    icq: IcqOptions = IcqOptions()
    joint: JointOptions = JointOptions()
    apiq: ApiqOptions = ApiqOptions()
    block: BlockOptions = BlockOptions()
    rules: tuple[QuantRule, ...] = ()
    """Overrides for some matrices. The first rule that matches a matrix applies. Consecutive layers
    with equal formats run in one compiled loop; each change of format between layers costs compile
    time."""
    budget: float | str | None = None
    """Choose formats for all matrices, so that the sum of their errors is the least for this size
    (LQ-LoRA). A number: bits a weight of the linear layers, with scales and shifts. "27GB" or
    "900MB" (10^9 and 10^6 bytes; GiB and MiB are 2^30 and 2^20): the whole base, with embeddings
    and norms, without the header of its file. "fit": the largest base that fits the device while
    it is trained. The choice sets `format`, `block_size`, `scale_bits`, `scale_rule` and `rules`.
    Matrices of the `rules` that are given keep what those say, and count."""
    allocation: AllocationOptions = AllocationOptions()

    def __post_init__(self) -> None:
        formats, calibrations = (*FORMATS, KEPT), tuple(CALIBRATIONS)
        require(self.format in formats, "quant.format", self.format, ", ".join(formats))
        size = self.block_size
        require(size > 0 and size % 8 == 0, "quant.block_size", size, "a positive multiple of 8")
        name = self.calibration
        require(name in calibrations, "quant.calibration", name, ", ".join(calibrations))
        _ = self.second_level  # checks its fields
        how = self.rounding
        require(how in ("nearest", "feedback"), "quant.rounding", how, "nearest or feedback")
        known = tuple(TITLES)
        require(self.training in known, "quant.training", self.training, ", ".join(known))
        share, by = self.outliers, self.outlier_rule
        require(0 <= share < 0.5, "quant.outliers", share, "a number from 0 to below 0.5")
        accepted = "magnitude or sensitivity"
        require(by in ("magnitude", "sensitivity"), "quant.outlier_rule", by, accepted)
        source = self.codes_from
        require(source in ("stored", "exact"), "quant.codes_from", source, "stored or exact")
        format = FORMATS.get(self.format)
        integer = format is not None and format.integer
        scales_alone = format is not None and name in ("none", "joint", "robust", "importance")
        accepted = f"false with quant.format {self.format} and quant.calibration {name}"
        ok = integer or scales_alone or not self.symmetric
        require(ok, "quant.symmetric", self.symmetric, accepted)
        if format is not None:
            able = [one.name for one in CALIBRATIONS.values() if one.most_bits >= format.bits]
            accepted = f"{' or '.join(able)} with quant.format {format.name}"
            require(name in able, "quant.calibration", name, accepted)
            refusal = CALIBRATIONS[name].refusal(format, self.symmetric, self.options)
            if refusal is not None:
                raise ValueError(refusal)
        for place, rule in enumerate(self.rules):
            field = f"quant.rules[{place}]"
            require(bool(rule.overrides), field, rule.match, "a rule that sets something")
            try:
                dataclasses.replace(self, rules=(), **rule.overrides)
            except ValueError as error:
                raise ValueError(f"{field} ({shorten(rule.match)}): {error}") from error
        if self.budget is not None:
            parse_budget(self.budget)
            _ = self.candidates  # checks them

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantConfig":
        """Reads the output of `dataclasses.asdict` of this or an earlier version."""
        values = with_current_names(values, RENAMED)
        nested = {
            one.name: type(one.options)(**values[one.name])
            for one in CALIBRATIONS.values()
            if one.options is not None and one.name in values
        }
        for name, options in (("apiq", ApiqOptions), ("block", BlockOptions)):
            if name in values:
                nested[name] = options(**values[name])
        if "allocation" in values:
            nested["allocation"] = AllocationOptions.from_dict(values["allocation"])
        rules = tuple(QuantRule(**rule) for rule in values.get("rules", ()))
        return cls(**{**values, **nested, "rules": rules})

    @property
    def candidates(self) -> tuple["QuantConfig", ...]:
        """The configurations that `budget` chooses from, without rules.

        Raises:
            ValueError: a candidate is not valid with the other fields.
        """
        found = []
        for one in self.allocation.candidates:
            fields = {"rules": (), "budget": None, "allocation": AllocationOptions()} | one
            try:
                found.append(dataclasses.replace(self, **fields))
            except ValueError as error:
                raise ValueError(f"quant.allocation ({one['format']}): {error}") from error
        return tuple(found)

    @property
    def options(self) -> Any:
        """The options of the chosen calibration; None if it has none."""
        chosen = CALIBRATIONS[self.calibration]
        return None if chosen.options is None else getattr(self, chosen.name, chosen.options)

    @property
    def plain(self) -> "QuantConfig":
        """The same storage without a calibration, rounded to the nearest levels."""
        # Keep a rule even if it only chose a calibration, because it shadows later rules.
        rules = tuple(
            dataclasses.replace(
                rule,
                calibration=rule.calibration and PLAIN.name,
                rounding=rule.rounding and "nearest",
            )
            for rule in self.rules
        )
        return dataclasses.replace(
            self,
            calibration=PLAIN.name,
            rounding="nearest",
            training="none",
            outlier_rule="magnitude",
            rules=rules,
        )

    @property
    def second_level(self) -> SecondLevel:
        """How scales and shifts are stored."""
        return SecondLevel(self.scale_rule, self.scale_bits, self.scale_group, self.scale_dtype)

    @property
    def feedback(self) -> bool:
        """Whether codes are computed with error feedback, where no rule says otherwise."""
        return self.rounding == "feedback" or CALIBRATIONS[self.calibration].feedback

    @property
    def needs_factor(self) -> bool:
        """Whether the factor of the error feedback is needed, where no rule says otherwise."""
        by_harm = self.outliers > 0 and self.outlier_rule == "sensitivity"
        return self.feedback or by_harm

    @property
    def needs_inputs(self) -> bool:
        """Whether a matrix that is quantized needs the second moments of its inputs."""
        own = self.needs_factor or CALIBRATIONS[self.calibration].needs == "inputs"
        rules = (dataclasses.replace(self, rules=(), **rule.overrides) for rule in self.rules)
        return (own and self.format != KEPT) or any(rule.needs_inputs for rule in rules)

    @property
    def needs_text(self) -> bool:
        """Whether a text is needed to quantize a model."""
        chosen = self.budget is not None and self.allocation.needs_text
        return chosen or self.needs_inputs or (self.quantizes and self.training != "none")

    @property
    def trainer(self) -> ApiqOptions | BlockOptions | None:
        """The options of the training; None without one."""
        return {"none": None, "apiq": self.apiq, "block": self.block}[self.training]

    @property
    def quantizes(self) -> bool:
        """Whether any matrix may be quantized."""
        names = self.format, *(rule.format for rule in self.rules)
        return self.budget is not None or any(name != KEPT for name in names)

    @property
    def scales_alone(self) -> bool:
        """Whether a calibration chooses scales without shifts, where no rule says otherwise."""
        format = FORMATS.get(self.format)
        calibrated = self.calibration != PLAIN.name and self.symmetric
        return calibrated and format is not None and not format.integer

    @property
    def label(self) -> str:
        """Format, calibration, rounding, training and outliers, as named in tables."""
        chosen = CALIBRATIONS[self.calibration]
        parts = [chosen.title] if chosen.title else []
        if self.rounding == "feedback" and not chosen.feedback:
            parts.append("feedback")
        if self.training != "none":
            parts.append(TITLES[self.training])
        label = " + ".join([self.format, *parts]) if parts else f"plain {self.format}"
        if self.scales_alone:
            label += ", no shifts"
        if self.outliers:
            label += f", {100 * self.outliers:.3g} % outliers"
            label += " by sensitivity" * (self.outlier_rule == "sensitivity")
        if self.scale_bits != 8:
            label += f", scales in {self.scale_bits} bits"
        return f"{label}, with rules" if self.rules else label

    def for_matrix(self, name: str) -> "QuantConfig":
        """The configuration of one matrix: applies the first matching rule and has no rules itself.

        Args:
            name: name of the matrix, such as layers.3.self_attn.q_proj.

        Examples:
            >>> rules = (QuantRule("layers.0.*", format="nf4"),)
            >>> config = QuantConfig(format="nf3", rules=rules)
            >>> [config.for_matrix(f"layers.{i}.mlp.up_proj").format for i in (0, 1)]
            ['nf4', 'nf3']
        """
        for rule in self.rules:
            if fnmatch.fnmatchcase(name, rule.match):
                return dataclasses.replace(self, rules=(), **rule.overrides)
        return dataclasses.replace(self, rules=()) if self.rules else self
