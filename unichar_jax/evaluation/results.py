"""What an evaluation found: measurements item by item, and what follows from them.

Means and intervals are derived when asked for, so results that were saved can be compared in pairs
later. Everything is plain JSON. Nothing here asks a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from unichar_jax.errors import UserError
from unichar_jax.evaluation.stats import Interval, Values, mean_interval, paired_difference
from unichar_jax.files import write_text

FORMAT = 1

ORIGINALS = "originals"
"""The fingerprint of held-out replies and pictures measured as if a model had made them."""


@dataclass(frozen=True)
class Metric:
    """What a number means.

    Attributes:
      title: for readers.
      better: which direction is better; "none" for a description without a goal.
      shown: "percent", "number", or "exp" for a mean of logarithms.
      about: one sentence on how it is computed.
    """

    title: str
    better: Literal["higher", "lower", "none"] = "higher"
    shown: Literal["percent", "number", "exp"] = "percent"
    about: str = ""


METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        "right answer",
        about="The likeliest letter is right; every order of the options is asked once, so that preferring a"
        " letter earns chance and no more.",
    ),
    "probability": Metric(
        "its probability", about="The right letter's share among the options' probabilities."
    ),
    "text_accuracy": Metric(
        "right without options",
        about="The option that is the likeliest answer per token is right; the prompt shows no options.",
    ),
    "answer_accuracy": Metric(
        "right in own words",
        about="The greedy answer to the question alone shares most words with the right option (F1), and fewer"
        " with every other; saying nothing of them is wrong, so chance is at most one in the number of options.",
    ),
    "exact": Metric(
        "exact answer", about="The greedy answer is the known one, up to case, articles and full stops."
    ),
    "contains": Metric("answer contains it", about="The greedy answer contains the known one."),
    "answer_nats_per_token": Metric(
        "answer's perplexity", "lower", "exp", "Per token of the known answer, its end included."
    ),
    "nats_per_token": Metric(
        "perplexity per token",
        "lower",
        "exp",
        "Of the published reply, its end included; depends on the tokenizer.",
    ),
    "nats_per_char": Metric(
        "perplexity per character", "lower", "exp", "Of the published reply; comparable between tokenizers."
    ),
    "words": Metric("words", "none", "number", "Length of a reply."),
    "catchphrase": Metric("catch-phrase", "none", about="Replies that contain the character's catch-phrase."),
    "voice": Metric("right voice", about="Replies whose turns of phrase are those of the character's voice."),
    "expected_words": Metric("fact named", about="Replies that contain the words of the known fact."),
    "judged": Metric(
        "judged, 1 to 7", shown="number", about="By the judge that was named, with the rubric shipped here."
    ),
    "clip_t": Metric("CLIP-T", shown="number", about="Cosine of the picture and the caption, or the reply."),
    "clip_i": Metric(
        "CLIP-I", shown="number", about="Mean cosine to the training pictures, text-image encoder."
    ),
    "dino": Metric("DINO", shown="number", about="Mean cosine to the training pictures, picture encoder."),
    "diversity": Metric("diversity", shown="number", about="Mean distance between pictures of one prompt."),
    "varied": Metric(
        "pictures of a prompt vary",
        shown="number",
        about="Mean distance between pictures of one prompt, in pixels; in the unit of the next. Never a reward.",
    ),
    "apart": Metric(
        "apart from training pictures",
        shown="number",
        about="Distance to the nearest training picture; 1 is the usual one between training pictures.",
    ),
    "copied": Metric(
        "copies",
        "lower",
        about="Pictures closer to a training picture than half the usual distance between training pictures.",
    ),
    "identity": Metric(
        "identity", about="Fixed attributes of the character that the independent judge reads."
    ),
    "prompt_following": Metric(
        "prompt following",
        about="Attributes of the scene that were asked for and that the independent judge reads.",
    ),
    "consistency": Metric(
        "words and picture agree",
        about="Attributes that the reply states and that the independent judge reads.",
    ),
}


def metric_of(name: str) -> Metric:
    """What a number means; one that is not in ``METRICS`` is shown as it is."""
    return METRICS.get(name, Metric(name, shown="number"))


def rank(name: str) -> tuple[int, str]:
    """The place of a metric in tables."""
    return (list(METRICS).index(name) if name in METRICS else len(METRICS), name)


PAPER: Mapping[tuple[str, str], float] = {
    ("knowledge_mcq", "accuracy"): 0.77,
    ("image_mcq", "accuracy"): 0.84,
    ("t2i", "clip_i"): 0.88,
    ("t2t2i", "clip_i"): 0.86,
    ("memorization", "judged"): 5.45,
}
"""What UniCharacter (arXiv 2605.08129) reports for its own model under its own protocol: quoted, not
measured."""


@dataclass(frozen=True)
class Record:
    """The measurements of one item with one seed, and the texts and picture they are of."""

    task: str
    character: str
    item: str
    seed: int
    metrics: Mapping[str, float]
    question: str = ""
    text: str = ""
    picture: str = ""


@dataclass(frozen=True)
class Results:
    """All measurements of one subject.

    Attributes:
      label: for readers: "base", "SFT".
      fingerprint: of the subject.
      records: one for each item and seed.
      rewarded: metrics that this model was trained to raise; they do not judge it.
      left_out: what was not measured, and why.
      settings: how it was made: context, seeds, seconds, versions.
    """

    label: str
    fingerprint: str
    records: tuple[Record, ...]
    rewarded: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measured(self) -> list[tuple[str, str]]:
        """(task, metric) of everything there is, tasks in their order and metrics in theirs."""
        found: dict[str, dict[str, None]] = {}
        for record in self.records:
            found.setdefault(record.task, {}).update(dict.fromkeys(record.metrics))
        return [(task, name) for task in found for name in sorted(found[task], key=rank)]

    @property
    def characters(self) -> list[str]:
        return list(dict.fromkeys(r.character for r in self.records))

    def values(self, task: str, metric: str, character: str | None = None) -> Values:
        """character -> item -> seed -> value, as ``stats`` takes them."""
        found: dict[str, dict[str, dict[Any, float]]] = {}
        for r in self.records:
            if r.task == task and metric in r.metrics and character in (None, r.character):
                found.setdefault(r.character, {}).setdefault(r.item, {})[r.seed] = r.metrics[metric]
        return found

    def interval(self, task: str, metric: str, character: str | None = None) -> Interval | None:
        """Mean and interval, over all characters or for one; None where nothing was measured."""
        return mean_interval(self.values(task, metric, character))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False, indent=1) + "\n"

    def save(self, path: str | Path) -> Path:
        """Writes a JSON file, complete or not at all."""
        path = Path(path)
        write_text(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Reads what ``save`` wrote.

        Raises:
          UserError: no such file, or not results of this version.
        """
        path = Path(path)
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree.pop("format") != FORMAT:
                raise ValueError("another version wrote it")
            records = tuple(Record(**r) for r in tree.pop("records"))
            return cls(records=records, **tree | {"rewarded": tuple(tree["rewarded"])})
        except FileNotFoundError:
            raise UserError(f"{path}: no results here; run 'unichar evaluate' first.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not results of an evaluation ({error}); evaluate again.") from None


def difference(
    first: Results, second: Results, task: str, metric: str, character: str | None = None
) -> Interval | None:
    """``second - first`` over the items and seeds that both have."""
    return paired_difference(first.values(task, metric, character), second.values(task, metric, character))
