"""How a dense model becomes a hybrid: the methods that benchmarks/conversion_quality.py compares.

Each is made of settings only, so that a user can do the same. ``today`` is the recipe that this project began
with; the methods behind it change one thing each, ``all`` changes everything, ``muon`` the optimizer of
``all`` alone, and ``small`` its lengths, its rates and what its layers are chosen on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

CALIBRATION_TOKENS = 16384
"""Read by the closed-form start; they count."""
SEQ_LENGTH = 2048
"""Of what is measured, and of what is trained on where a stage does not say otherwise."""


@dataclass(frozen=True)
class Choice:
    """What spikingbrain-choose-layers reads to find the layers that cost the least."""

    tokens: int = 8192
    """That every swap is measured on; of documents that are trained on by no method."""
    calibration_tokens: int = CALIBRATION_TOKENS
    """That the swapped layers are started on."""


@dataclass(frozen=True)
class Conversion:
    """Which layers change, what they become, and what stands in front of the text."""

    name: str
    mixer: str = "gla"
    """What those layers become."""
    choice: Choice | None = None
    """How layers are chosen; None takes every second one, from the first on."""
    sinks: int = 0
    """Learnable tokens that all windows see, as in SpikingBrain-76B (arXiv 2509.05276, section 2.2)."""

    @property
    def tokens_read(self) -> int:
        """Of training text, before any stage; they count."""
        return self.choice.tokens + self.choice.calibration_tokens if self.choice else 0


EVEN = Conversion("even")
EVEN_DELTA = Conversion("even_gdn", mixer="gdn")
EVEN_SINK = Conversion("even_sink", sinks=1)
CHOSEN = Conversion("chosen", choice=Choice())
CHOSEN_SINK = Conversion("chosen_sink", choice=Choice(), sinks=1)
CHEAPLY_CHOSEN_SINK = Conversion("cheaply_chosen_sink", choice=Choice(2048, 8192), sinks=1)


@dataclass(frozen=True)
class Stage:
    """A stage of a method.

    Attributes:
        kind: ``stage.kind``.
        share: of the tokens behind what is read without a step; 0 is a closed-form start that trains nothing.
        settings: of spikingbrain-train, in its words.
        seq_length: of the sequences that it trains on.
    """

    kind: str
    share: float
    settings: tuple[str, ...]
    seq_length: int = SEQ_LENGTH


@dataclass(frozen=True)
class Method:
    """A way from dense to hybrid."""

    name: str
    about: str
    conversion: Conversion
    stages: tuple[Stage, ...]


_COSINE = ("optimizer.lr_decay_style=cosine", "optimizer.weight_decay=0")
_TODAYS_ALIGNMENT = Stage(
    "align",
    2 / 3,
    ("optimizer.lr=5e-3", "optimizer.min_lr=5e-4", f"stage.alignment.calibration_tokens={CALIBRATION_TOKENS}")
    + _COSINE,
)
_MIXED = Stage(
    "distill",
    1 / 3,
    (
        "stage.distillation.weight=0.3",
        "optimizer.lr=5e-4",
        "optimizer.min_lr=5e-5",
        "optimizer.new_parameter_lr_mult=2",
    )
    + _COSINE,
)
PURE_KL = Stage(
    "distill",
    1.0,
    ("optimizer.lr=1e-4", "optimizer.min_lr=1e-5", "optimizer.mixer_lr_mult=10") + _COSINE,
)
_STUDENT_INPUTS = (
    "stage.alignment.calibration_inputs=student",
    "stage.alignment.fit_source_projections=true",
)


def _start_only(*settings: str) -> Stage:
    return Stage("align", 0.0, (f"stage.alignment.calibration_tokens={CALIBRATION_TOKENS}", *settings))


PLAIN = Method(
    "plain",
    "next-token loss alone, from the swap on (arXiv 2509.05276, section 3.4)",
    EVEN,
    (Stage("cpt", 1.0, ("optimizer.lr=5e-4", "optimizer.min_lr=5e-5", *_COSINE)),),
)
TODAY = Method("today", "alignment, then next-token loss with 0.3 of KL", EVEN, (_TODAYS_ALIGNMENT, _MIXED))
KL = replace(
    TODAY,
    name="kl",
    about="today's, its last stage on KL alone, mixers at ten times the rate of the rest",
    stages=(_TODAYS_ALIGNMENT, replace(PURE_KL, share=1 / 3)),
)
START_ONLY, START_ON_STUDENT = _start_only(), _start_only(*_STUDENT_INPUTS)
NO_ALIGNMENT = replace(
    KL,
    name="start",
    about="KL from the closed-form start on, no steps of alignment",
    stages=(START_ONLY, PURE_KL),
)
DELTA = replace(
    NO_ALIGNMENT,
    name="gdn",
    about="start's, with the gated delta rule in the place of gated linear attention",
    conversion=EVEN_DELTA,
)
REFIT = replace(
    TODAY,
    name="refit",
    about="today's, started on the student's own hidden states, with what the source keeps fitted as well",
    stages=(replace(_TODAYS_ALIGNMENT, settings=_TODAYS_ALIGNMENT.settings + _STUDENT_INPUTS), _MIXED),
)
LAYERS = replace(TODAY, name="layers", about="today's, in chosen layers", conversion=CHOSEN)
SINK = replace(TODAY, name="sink", about="today's, with one sink token", conversion=EVEN_SINK)
ALL = Method(
    "all",
    "chosen layers, a sink token, closed-form start on the student's own hidden states, KL alone",
    CHOSEN_SINK,
    (START_ON_STUDENT, PURE_KL),
)
MUON = replace(
    ALL,
    name="muon",
    about="all's, with Muon for the matrices of hidden layers, at the same rates",
    stages=(START_ON_STUDENT, replace(PURE_KL, settings=("optimizer.kind=muon", *PURE_KL.settings))),
)
_GENTLE_KL = Stage(
    "distill",
    1.0,
    ("optimizer.lr=3e-5", "optimizer.min_lr=3e-6", "optimizer.mixer_lr_mult=5", "optimizer.lr_warmup_iters=2")
    + _COSINE,
    seq_length=1024,
)
SMALL = replace(
    ALL,
    name="small",
    about="all's below 100k tokens: layers chosen on fewer, then shorter sequences at a lower rate",
    conversion=CHEAPLY_CHOSEN_SINK,
    stages=(START_ON_STUDENT, _GENTLE_KL),
)

METHODS = {
    method.name: method
    for method in (PLAIN, TODAY, KL, NO_ALIGNMENT, DELTA, REFIT, LAYERS, SINK, ALL, MUON, SMALL)
}
