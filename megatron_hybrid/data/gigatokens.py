"""Hugging Face byte-level BPE by gigatoken: the same ids as the tokenizers library, many times faster.

Equality is checked, not assumed: before a run on a sample of its own text and on the texts of :func:`hard_texts`, and
under --verify-tokens on everything. gigatoken's file readers are not used: they lose the rest of a file after a
malformed line. Nor are its SentencePiece models, whose ids differ in some documents.
"""

import json
import os
from functools import cache

import numpy as np

from megatron_hybrid.data.tokenizers import HuggingFaceTokenizer, Ids, join, split

UNLIKE = (
    "088F 0C5C 0CDC A7CE-A7CF A7D2 A7D4 A7F1 10940-10959 10EC5-10EC7 11DB0-11DDB 11DE0-11DE9 16EA0-16EB8 16EBB-16ED3 "
    "16FF2-16FF6 187F8-187FF 18D09-18D1E 18D80-18DF2 1E6C0-1E6DE 1E6E0-1E6E2 1E6E4-1E6E5 1E6E7-1E6ED 1E6F0-1E6F4 "
    "1E6FE-1E6FF 2B73A-2B73F 2CEA2-2CEAD 323B0-33479"
)
"""Characters that gigatoken 0.10.0 classifies as letters or digits, and tokenizers 0.23.3 does not: new in Unicode 17.

Found by comparing every code point; texts with one of them go to the slower library. A test compares them again.
"""
_CHECK_BYTES = 8_000_000
"""Text that is encoded between two looks at the memory."""


class GigatokenTokenizer:
    """The ids of a HuggingFaceTokenizer.

    gigatoken keeps every word that it has seen: up to 8 bytes for each byte of text when words do not repeat. The
    tokenizer is rebuilt (about 0.1 s) when the process has grown by ``memory_limit`` bytes.
    """

    def __init__(self, reference: HuggingFaceTokenizer, memory_limit: int = 1 << 30) -> None:
        """Load the reference's file; raises ValueError if gigatoken refuses it. See :func:`unsuitable` first."""
        self.vocab_size, self.bos_id, self.eod_id = reference.vocab_size, reference.bos_id, reference.eod_id
        self.fingerprint, self._reference = reference.fingerprint, reference
        self.memory_limit = memory_limit
        self._load()
        self._begin = _own_bytes()

    def _load(self) -> None:
        from gigatoken.gigatoken_rs import BPETokenizer, load_hf_json

        try:
            # From memory: a path of the form name/name would be looked up on a model hub.
            self._backend = load_hf_json(self._reference.content)
        except Exception as error:  # what a Rust extension raises is not said
            raise ValueError(f"gigatoken does not support the tokenizer ({error})") from None
        if not isinstance(self._backend, BPETokenizer):
            raise ValueError("gigatoken does not accept the tokenizer as byte-level BPE")
        self._encoded = 0

    def encode(self, texts: list[str]) -> Ids:
        """Return the ids of the texts."""
        unlike = [i for i, text in enumerate(texts) if not text.isascii() and self._holds_unlike(text)]
        if not unlike:
            return self._encode(texts)
        parts = split(self._encode(texts))
        for i in unlike:
            parts[i] = self._reference.encode([texts[i]]).ids
        return join(parts)

    def _holds_unlike(self, text: str) -> bool:
        return bool(_unlike()[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)].any())

    def _encode(self, texts: list[str]) -> Ids:
        if not texts:
            return Ids(np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64))
        layout = self._backend.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        self._encoded += sum(map(len, texts))
        if self._encoded > _CHECK_BYTES:
            self._encoded = 0
            if _own_bytes() - self._begin > self.memory_limit:
                del self._backend
                self._load()
        return Ids(ids, np.diff(offsets))

    def decode(self, ids: list[int]) -> str:
        """Return the text of some ids."""
        return self._reference.decode(ids)


def version() -> str:
    """Return the installed version of gigatoken; empty if there is none."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("gigatoken")
    except PackageNotFoundError:
        return ""


@cache
def _unlike() -> np.ndarray:
    """Whether each code point is one of UNLIKE; a regular expression would take ten times as long."""
    table = np.zeros(0x110000, dtype=bool)
    for part in UNLIKE.split():
        first, _, last = part.partition("-")
        table[int(first, 16) : int(last or first, 16) + 1] = True
    return table


def unsuitable(reference: HuggingFaceTokenizer) -> str:
    """Return why gigatoken cannot replace a tokenizer; empty if it can be tried."""
    if not version():
        return "the package gigatoken is not installed"
    config = json.loads(reference.content)
    model, pre = config.get("model") or {}, config.get("pre_tokenizer") or {}
    steps = [pre, *pre.get("pretokenizers", [])]
    byte_level = any(step.get("type") == "ByteLevel" for step in steps)
    if model.get("type") != "BPE" or model.get("byte_fallback") or not byte_level:
        return "the tokenizer is not byte-level BPE"
    return "the tokenizer's BPE has dropout" if model.get("dropout") else ""


def first_difference(reference: HuggingFaceTokenizer, other: GigatokenTokenizer, texts: list[str]) -> str | None:
    """Return the first text to which the two give other ids; None if there is none."""
    wanted, found = reference.encode(texts), other.encode(texts)
    if np.array_equal(wanted.lengths, found.lengths) and np.array_equal(wanted.ids, found.ids):
        return None
    pairs = zip(texts, split(wanted), split(found), strict=True)
    return next(text for text, a, b in pairs if not np.array_equal(a, b))


def hard_texts(added_tokens: list[str]) -> list[str]:
    """Return texts at which tokenizers differ: added tokens, Unicode, whitespace, long runs."""
    texts = [f"{left}{token}{right}" for token in added_tokens[:64] for left, right in _AROUND]
    texts += [token[:cut] + " " + token[cut:] for token in added_tokens[:16] for cut in (1, len(token) // 2)]
    blanks = (" ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\u0085", "\u2028", "\x0b", "\x1c")
    texts += [f"{blank * count}x{blank * count}1{blank * count}" for blank in blanks for count in (1, 2, 3, 7, 40)]
    texts += [a + b + "word" + b + a for a in blanks for b in blanks]
    texts += [part * count for part in _RUNS for count in (1, 2, 3, 4, 17, 1000)]
    return texts + list(_UNICODE)


_AROUND = (("", ""), ("a", "b"), (" ", " "), ("\n", "\n"), ("x  ", "  y"), ("<", ">"), ("\u00e9", "\u4e2d"))
_RUNS = (
    *("a", "A", "0", "12", " ", "\n", "\t", "!", "-", "=", "_", "1,", "ab ", "'s", "\r\n", "#\n"),
    *("\u00e9", "\u4e2d", "\U0001f642", "\u0301"),
)
_UNICODE = (
    "I'll we'VE don't 'S ''re can\u2019t",
    "caf\u00e9 cafe\u0301 \u212b \ufb01ne \uff21\uff22\uff23 \u00bd \u2460 \u0660\u0661\u0662 \u0967\u0968 \U0001d7d9",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea ",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "\u6f22\u5b57\u304b\u306a\u30ab\u30ca \ud55c\uad6d\uc5b4 \u1112\u1161\u11ab \U00020000\U0002a6d6",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001f44d\U0001f3fd",
    "\ufeffstart \ufffd \uffff \U0010ffff \ue000 \u00ad soft\u00adhyphen \u200e\u200f \u202e",
    "\x01\x02\x7f\x80\x9f \x1b[31m red",
    "\u0130stanbul \u0131 \u1e9e \u00df \u01c5 \u02b0 \u2160 \u0345",
    "http://example.org/a?b=c&d=%20#e  if(x==1){\n\t\treturn -1;\n\t}\n\n\n\n    pass\n",
    "1234567890 3.14159 1e-10 0xFF 1,000,000 12:34:56 ++--==>>",
    "a\u0300\u0301\u0302\u0303 e\u0323\u0307 \u0e33 \u0f77 \uac00\u11a8",
    "",
)


def _own_bytes() -> int:
    """Resident memory of this process, without files that are mapped."""
    with open("/proc/self/statm") as stream:
        _, resident, shared, *_ = stream.read().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
