"""Scorers by name: what a configuration may call a term of the reward, and what is built for it.

The encoders lie in one folder (``scoring.folder``); only what the named terms need is loaded. A judge that may lie
beside them is no scorer, and no term can name it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from unichar_jax.data.images import ImageTransform
from unichar_jax.errors import UserError, did_you_mean
from unichar_jax.scoring import identity
from unichar_jax.scoring.base import Scorer
from unichar_jax.scoring.custom import CustomScorer
from unichar_jax.scoring.diversity import FeatureDiversity
from unichar_jax.scoring.folder import JUDGE, EncoderFolder, kind_of
from unichar_jax.scoring.identity import IdentityScorer
from unichar_jax.scoring.visual_questions import VisualQuestions

Options = Mapping[str, Any]


@dataclass
class Sources:
    """Where scorers come from; encoders are loaded when a term first needs them.

    Attributes:
      folder: of the encoders.
      tokenizer: of that model.
      look: how that model's run looks at pictures (``data.transforms``).
      timeout: seconds that a custom function may take.
    """

    folder: Path
    tokenizer: Any
    look: ImageTransform
    timeout: float = 300.0

    @cached_property
    def encoders(self) -> EncoderFolder:
        return EncoderFolder(self.folder)

    def band(self, options: Options) -> Scorer:
        low = options.get("low", identity.REFERENCE_BAND[0])
        high = options.get("high", identity.REFERENCE_BAND[1])
        return IdentityScorer(self.encoders.identity, band=(low, high))


BUILDERS: dict[str, Callable[[Sources, Options], Scorer]] = {
    "text_image_match": lambda s, o: s.encoders.text_image(**{"name": "text_image_match", **o}),
    "identity": lambda s, o: IdentityScorer(s.encoders.identity),
    "identity_band": lambda s, o: s.band(o),
    "diversity": lambda s, o: s.encoders.diversity(**o),
    "feature_diversity": lambda s, o: FeatureDiversity(s.encoders.identity),
    "visual_questions": lambda s, o: VisualQuestions(s.tokenizer, s.look, **o),
}
"""Name of a term -> its scorer. ``file.py:function`` names a function of the user's instead."""


def build(name: str, options: Options, sources: Sources) -> Scorer:
    """The scorer that a term names.

    Raises:
      UserError: an unknown name or option, or weights that are absent.
    """
    if ".py:" in name:
        return CustomScorer(name, timeout=sources.timeout)
    if name not in BUILDERS:
        wrong = f"is unknown{did_you_mean(name, BUILDERS)}"
        if JUDGE in (kind_of(sources.folder / name), kind_of(Path(name))):
            wrong = "is a judge, which reports and never rewards: what is optimised must not judge"
        raise UserError(
            f"reward term '{name}' {wrong}; expected one of {', '.join(BUILDERS)}, or path/to/file.py:function."
        )
    try:
        return BUILDERS[name](sources, options)
    except TypeError as error:
        raise UserError(f"reward term '{name}': options {dict(options)} do not fit ({error}).") from None
