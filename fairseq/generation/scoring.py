"""Scores of translations, all computed by sacrebleu.

``bleu`` is BLEU on tokens as they are, what multi-bleu computes and the Admin papers report; ``sacrebleu`` and ``chrf``
are for detokenised text and print their signature, which is what makes a score comparable.
"""

from __future__ import annotations

from typing import Any

from fairseq.errors import FairseqError

SCORERS = ("bleu", "sacrebleu", "chrf")
UNK, UNMATCHED_UNK = "<unk>", "<<unk>>"


class Scorer:
    """Collects sentence pairs and scores them as one corpus.

    name: one of SCORERS. order: longest n-gram (bleu). lowercase: ignore case. smooth: count one match more for each
    n-gram longer than a word (bleu), without which hardly a single sentence has a score above 0. tokenized: leave
    tokens as they are (sacrebleu), whose smoothing of orders without a match remains.
    """

    def __init__(
        self,
        name: str = "bleu",
        *,
        order: int = 4,
        lowercase: bool = False,
        smooth: bool = False,
        tokenized: bool = False,
    ) -> None:
        from sacrebleu.metrics import BLEU, CHRF  # 0.1 s that commands with nothing to score need not wait

        self.name = name
        self.references: list[str] = []
        self.hypotheses: list[str] = []
        self._metric: Any
        if order < 1:
            raise FairseqError(f"--order {order}: must be at least 1")
        if name == "bleu":
            smoothing = {"smooth_method": "add-k", "smooth_value": 1} if smooth else {"smooth_method": "none"}
            self._metric = BLEU(tokenize="none", force=True, lowercase=lowercase, max_ngram_order=order, **smoothing)
        elif name == "sacrebleu":
            self._metric = BLEU(lowercase=lowercase, tokenize="none" if tokenized else None, force=tokenized)
        elif name == "chrf":
            self._metric = CHRF(lowercase=lowercase)
        else:
            raise FairseqError(f"--scoring {name}: choose from {', '.join(SCORERS)}")

    def add(self, reference: str, hypothesis: str) -> None:
        """Add one pair; for bleu both are space-separated tokens, and a reference's ``<unk>`` is matched by nothing."""
        if self.name == "bleu":
            reference = " ".join(UNMATCHED_UNK if token == UNK else token for token in reference.split())
        self.references.append(reference)
        self.hypotheses.append(hypothesis)

    def score(self) -> float:
        """The score, from 0 to 100. Raises FairseqError when nothing was added."""
        return self._compute().score

    def result_string(self) -> str:
        """The score with its parts, in fairseq's form for bleu, else with its signature.

        Raises FairseqError when nothing was added.
        """
        result = self._compute()
        if self.name != "bleu":
            return result.format(signature=self._metric.get_signature().format())
        precisions = "/".join(f"{precision:.1f}" for precision in result.precisions)
        ratio = result.sys_len / result.ref_len if result.ref_len else 0.0
        return (
            f"BLEU{self._metric.max_ngram_order} = {result.score:.2f}, {precisions} "
            f"(BP={result.bp:.3f}, ratio={ratio:.3f}, syslen={result.sys_len}, reflen={result.ref_len})"
        )

    def _compute(self) -> Any:
        if not self.hypotheses:
            raise FairseqError("nothing to score: there are no hypotheses")
        return self._metric.corpus_score(self.hypotheses, [self.references])
