"""Falcon's tokenizer: text to ids, and ids back to text byte by byte.

Decoding goes through the bytes of each token, so text can be emitted while it is generated. A token
border may fall inside a UTF-8 character, which then appears with its last byte.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from .errors import CheckpointError

MAX_TOKEN_ID = 1 << 20  # Falcon's are below 2**17; the table of bytes is as long as the highest id
# Comes back unchanged from a byte-level BPE without a normalizer, and from nothing else.
PROBE = " Aa\n\té漢🙂"


def byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level BPE vocabulary stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable}
    return table | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """A checkpoint's tokenizer.json.

    Raises: CheckpointError if the file is missing, damaged or not a byte-level BPE.
    """

    def __init__(self, directory: Path):
        self.path = directory / "tokenizer.json"
        if not self.path.is_file():
            raise CheckpointError(
                f"{self.path}: no such file; save the tokenizer beside the model "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(DIR))"
            )
        try:
            self._tokenizer = HfTokenizer.from_file(str(self.path))
            model = json.loads(self.path.read_text(encoding="utf-8"))["model"]
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{self.path}: cannot be read ({error})") from None
        if model.get("type", "BPE") != "BPE":
            raise CheckpointError(f"{self.path}: must be a byte-level BPE, got {model.get('type')}")
        # A saved tokenizer may carry truncation or padding settings of its training.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Older files spell a merge "a b", newer ones ["a", "b"].
        self._merges = [
            tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])
        ]
        self.special_ids = frozenset(
            i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special
        )
        self._token_bytes = self._build_token_bytes()
        if self.decode(self.encode(PROBE)) != PROBE:
            raise CheckpointError(
                f"{self.path}: does not give back the text {PROBE!r} from its tokens; Falcon's "
                "tokenizers are byte-level BPE without a normalizer"
            )

    def _build_token_bytes(self) -> list[bytes]:
        alphabet = byte_level_alphabet()
        added = self._tokenizer.get_added_tokens_decoder()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        highest = max(vocabulary.values(), default=0)
        if highest > MAX_TOKEN_ID:
            raise CheckpointError(f"{self.path}: token id {highest} is over {MAX_TOKEN_ID}")
        token_bytes = [b""] * (highest + 1)
        for token, token_id in vocabulary.items():
            if token_id in added:
                token_bytes[token_id] = b"" if added[token_id].special else token.encode()
                continue
            try:
                token_bytes[token_id] = bytes(alphabet[c] for c in token)
            except KeyError:
                raise CheckpointError(
                    f"{self.path}: token {token_id} ({token!r}) is not byte-level; "
                    "Falcon's tokenizers are byte-level BPE"
                ) from None
        return token_bytes

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return len(self._token_bytes)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special token is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, token_ids: list[int]) -> str:
        """Text of ids without special tokens; bytes that are not UTF-8 become U+FFFD."""
        decoder = TextStream(self)
        return "".join(decoder.push(i) for i in token_ids) + decoder.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """A token's bytes; none for special tokens and ids beyond the vocabulary (padding)."""
        return self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""

    def check_same(self, other: Tokenizer) -> None:
        """Raise CheckpointError with counts unless both map text to the same ids."""
        mine = self._tokenizer.get_vocab(with_added_tokens=True)
        theirs = other._tokenizer.get_vocab(with_added_tokens=True)
        num_tokens = len({token for token, _ in mine.items() ^ theirs.items()})
        num_merges = sum(a != b for a, b in zip(self._merges, other._merges, strict=False))
        num_merges += abs(len(self._merges) - len(other._merges))
        if num_tokens or num_merges:
            raise CheckpointError(
                f"{other.path} differs from {self.path} in {num_tokens} vocabulary entries and "
                f"{num_merges} merges; base and domain must share one tokenizer"
            )


class TextStream:
    """Turns token ids into text as they come; a character appears once it is complete."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes (may be empty)."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left: U+FFFD if the last character was cut, else nothing."""
        return self._decoder.decode(b"", final=True)
