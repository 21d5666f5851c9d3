"""What a text is."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Pages of text and where they come from."""

    name: str
    """What reports call it."""
    pages: tuple[str, ...]
    """As the source has them: WikiText pages are not detokenised, as words are counted on the original."""
    is_wikitext: bool = False
    """Whether the pages are tokenised as WikiText is, with ` @-@ ` for hyphens."""

    @property
    def sha256(self) -> str:
        """Hash of the pages, each followed by a zero byte: equal for equal pages, whatever file they come from."""
        digest = hashlib.sha256()
        for page in self.pages:
            digest.update(page.encode() + b"\0")
        return digest.hexdigest()
