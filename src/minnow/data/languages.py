"""Which language a text is in, told offline by py3langid (naive Bayes over byte n-grams, Lui and Baldwin 2012)."""

from __future__ import annotations

from collections.abc import Sequence

from minnow.config import UserError

READ_CHARACTERS = 1000
"""Of a text; more changes hardly any verdict."""
_WRITTEN_AS = {"zh": ("wuu", "yue")}  # short Chinese texts are often taken for Wu or Cantonese
_NO_LANGUAGE = "zxx"  # figures, code


class LanguageFilter:
    """Tells texts in other languages than the wanted ones."""

    def __init__(self, wanted: Sequence[str]) -> None:
        """`wanted` are ISO 639 codes ("en", "zh"). Raises UserError for one that the model does not know."""
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError as error:
            raise UserError("--languages needs py3langid: pip install 'minnow[clean]'") from error
        self._model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        known = sorted(set(self._model.labels) - {_NO_LANGUAGE})
        if unknown := [code for code in wanted if code not in known]:
            raise UserError(f"--languages {', '.join(unknown)}: not known; known are {', '.join(known)}")
        self._wanted = {*wanted, _NO_LANGUAGE}.union(*(_WRITTEN_AS.get(code, ()) for code in wanted))

    def other_language(self, text: str) -> tuple[str, float] | None:
        """Return (language, probability) of a text that is surely, above 0.5, in a language not wanted; else None.

        A text too short or too mixed to tell has no such language and passes.
        """
        language, probability = self._model.classify(text[:READ_CHARACTERS])
        return None if language in self._wanted or probability <= 0.5 else (language, probability)
