"""Text to ids and back. A vocabulary is one file, Hugging Face's tokenizer.json (hf_tokenizer.py).

tiktoken encodes whatever it provably encodes alike: our own vocabularies, GPT-2's, Llama-3's, Qwen's,
SmolLM2's. Any other file (SentencePiece's kind, T5's) goes through the `tokenizers` library, imported only
then. Special tokens that a text spells are ordinary text."""
import codecs
import contextlib
import hashlib
import json
import os

import numpy as np
import tiktoken

from nanolost import hf_tokenizer as hf
from nanolost.chat import render
from nanolost.errors import UserError
from nanolost.files import expanded, parse_json, read_bounded, write_atomic
from nanolost.hf_tokenizer import BYTE_PATTERN, GPT2_PATTERN
from nanolost.tokenizer_engines import Library, Tiktoken, compare, silent_stderr, well_formed
from nanolost.tokenizer_formats import (
    CONFIG,
    END_OF_TEXT,
    FILE_LIMIT,
    GENERATION,
    NOT_PASSED_ON,
    OLD_FORMAT,
    chat_template,
    check_vocabulary,
    end_of_text,
    json_beside,
    known_pattern,
    old_digest,
    read_beside,
    read_old,
    read_tiktoken,
    tokens_by_role,
)

class Tokenizer:
    """Text ↔ ids. UserError for a vocabulary that cannot do it.

    vocab_size: the largest id and one. eot: the id that ends a text; ends: all ids at which a sample ends;
    pad: fills a row up. start: ids that each document of a stream begins with. before, after: ids around the
    text of a row, to the letter of the file's post-processor. name: for messages."""

    def __init__(
        self,
        engine: Tiktoken | Library,
        special: dict[str, int],
        edges: tuple[list[int], list[int]],
        files: dict[str, bytes] | None = None,
        data: bytes | None = None,
    ):
        """special: id of each special token; edges: before and after; files: what stands beside the
        tokenizer.json, by name; data: its bytes, None where they are still to be written."""
        self.engine = engine
        self.special = special
        self.before, self.after = edges
        self.files_beside = files or {}
        self.data = data
        self.name = engine.name
        self.lengths = engine.lengths
        self.vocab_size = len(engine.lengths)
        self.roles = tokens_by_role(self.files_beside)
        self.eot = end_of_text(special, self.roles)
        # no loss looks at padding, so that any id will do
        self.pad = special.get(self.roles.get("pad_token"), self.eot)
        self.start = self.before or [self.eot]
        # generation_config.json names several for a model that chats
        ends = json_beside(self.files_beside, GENERATION).get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {self.eot, *filter(hf.is_id, ends)}
        # a split pattern that a user has named
        self.foreign = False
        # of the file of an earlier version that this was read from
        self.old_digest = None

    # --- where tokenizers come from ---

    @classmethod
    def of(cls, tokens: list[bytes], pattern: str = GPT2_PATTERN, name: str = "") -> "Tokenizer":
        """A vocabulary of our own. tokens: the byte string of each id from 0; end-of-text is the id after the
        last. pattern: the regular expression that cuts a text before merging."""
        check_vocabulary(tokens)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        eot = len(tokens)
        # one spelling a pattern, or equal vocabularies would have two identities
        vocabulary = hf.ByteLevel(ranks, hf.SPELLINGS.get(pattern, pattern), {END_OF_TEXT: eot})
        return cls(Tiktoken(vocabulary, name), vocabulary.special, ([eot], []))

    @classmethod
    def load(cls, path: str, split_pattern: str | None = None) -> "Tokenizer":
        """From a Hugging Face folder, a tokenizer.json (theirs, or our older format), or a .tiktoken file,
        whose split pattern must be known here or given. UserError for any other file, and for one whose
        tokens or pattern lose text."""
        path = expanded(os.fspath(path))
        try:
            with silent_stderr():
                return cls._read(path, split_pattern)
        except UserError as e:
            raise UserError(f"{path} is no tokenizer: {e}; give a tokenizer.json, a Hugging Face folder, "
                            "or a .tiktoken file with ranks 0, 1, 2, …") from None

    @classmethod
    def _read(cls, path: str, split_pattern: str | None) -> "Tokenizer":
        file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        data = read_bounded(file, FILE_LIMIT)
        # nothing of the content decides how it is read: no pickle, no class by name
        if file.endswith(".tiktoken"):
            return cls._of_tiktoken(data, os.path.basename(file), split_pattern)
        if split_pattern:
            raise UserError("a split pattern belongs to a .tiktoken file, this one has its own")
        content = parse_json(data, os.path.basename(file))
        if content.get("format") != OLD_FORMAT:
            return cls._of_json(data, content, file)
        tokenizer = cls.of(*read_old(content))
        tokenizer.engine.try_out()
        # whatever has written it: a manifest names these bytes
        tokenizer.old_digest = hashlib.sha256(data).hexdigest()
        return tokenizer

    @classmethod
    def _of_tiktoken(cls, data: bytes, name: str, split_pattern: str | None) -> "Tokenizer":
        tokens = read_tiktoken(data)
        check_vocabulary(tokens)
        pattern = split_pattern or known_pattern(tokens)
        if pattern is None:
            raise UserError("it holds no split pattern, and that of this vocabulary is not known here: name "
                            "it by prepare_c4.py --split_pattern REGEX")
        tokenizer = cls.of(tokens, pattern, name)
        # no byte of it is ours, and nobody else has tried the two together
        tokenizer.foreign = split_pattern is not None
        tokenizer.engine.try_out()
        return tokenizer

    @classmethod
    def _of_json(cls, data: bytes, content: dict, file: str) -> "Tokenizer":
        if not isinstance(content.get("model"), dict):
            raise UserError("it is not in Hugging Face's format, nor in ours")
        special = hf.special_tokens(content)
        files = read_beside(os.path.dirname(file))
        engine = cls._engine(data, content, file)
        # nobody else's reader takes a byte-order mark
        data = data.removeprefix(codecs.BOM_UTF8)
        return cls(engine, special, hf.edges(content), files, data)

    @staticmethod
    def _engine(data: bytes, content: dict, name: str) -> Tiktoken | Library:
        vocabulary = hf.read_byte_level(content)
        if vocabulary:
            # a pattern that does not match all of a text: the library keeps what is between the matches
            with contextlib.suppress(UserError):
                engine = Tiktoken(vocabulary, name, data)
                engine.try_out()
                return engine
        engine = Library(data, content, name)
        engine.try_out()
        return engine

    @classmethod
    def named(cls, name: str, split_pattern: str | None = None) -> "Tokenizer":
        """"byte" (256 bytes), "gpt2" (tiktoken fetches its vocabulary once from the network), or a path."""
        if name == "byte":
            return cls.of([bytes([byte]) for byte in range(256)], BYTE_PATTERN, name)
        if name != "gpt2":
            return cls.load(name, split_pattern)
        try:
            gpt2 = tiktoken.get_encoding(name)
        # of many kinds: no network, no such host, a damaged cache
        except Exception as e:
            raise UserError(
                f"tiktoken could not fetch GPT-2's vocabulary ({type(e).__name__}). Without a network give "
                "--tokenizer a .tiktoken file with its ranks, set TIKTOKEN_CACHE_DIR to a folder with it, or "
                "use --tokenizer train:N (trained on your text) or byte") from None
        # built anew, so that it can be saved like any other
        tokens = [gpt2.decode_single_token_bytes(i) for i in range(gpt2.eot_token)]
        return cls.of(tokens, name=name)

    # --- text ↔ ids ---

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text and nothing around it, (n,) uint32. Other threads run meanwhile. UserError where
        the split pattern cannot cope with the text."""
        return self.engine.encode(well_formed(text))

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_special(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are what they say: one that a chat template has made."""
        return self.engine.encode_special(well_formed(text))

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a conversation up to where the model answers, by the chat template that came with it."""
        template = chat_template(self.files_beside)
        if template is None:
            raise UserError("the model has no chat template: it was not made to chat, use --chat false")
        ids = self.encode_special(render(template, messages, self.roles))
        # whose every part is undefined, as what the sandbox refuses is
        if not ids:
            raise UserError("the model's chat template makes an empty text of the prompt: use --chat false")
        return ids

    def document(self, text: str) -> np.ndarray:
        """A document of a stream, (n,) uint32: what begins one, then the text."""
        return np.concatenate([np.array(self.start, np.uint32), self.encode_array(text)])

    def row(self, text: str, length: int | None = None) -> np.ndarray:
        """A text between what the post-processor puts around it, (n,) uint32; of at most `length` ids, for
        which the text is cut."""
        ids = self.encode_array(text)
        # as transformers cuts: what stands around the text stays
        if length is not None:
            ids = ids[:max(0, length - len(self.before) - len(self.after))]
        return np.concatenate([np.array(self.before, np.uint32), ids, np.array(self.after, np.uint32)])

    def decode(self, ids) -> str:
        """Text of some ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        # both engines want ints, and get tensors and arrays
        return self.engine.decode([int(i) for i in ids])

    def continuation(self, before, ids) -> str:
        """The text that `ids` add behind the ids `before`."""
        # SentencePiece's kind takes a space from the front of whatever it decodes
        if isinstance(self.engine, Tiktoken):
            return self.decode(ids)
        known = self.decode(before)
        whole = self.decode([*before, *ids])
        # one whose end depends on what follows is printed as it stands
        return whole.removeprefix(known) if whole.startswith(known) else self.decode(ids)

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: UTF-8 bytes of text behind each id; none behind special tokens."""
        return self.lengths

    def known(self) -> np.ndarray:
        """(vocab_size,) bool: which ids have a token."""
        mask = np.zeros(self.vocab_size, bool)
        mask[list(self.engine.sizes)] = True
        return mask

    def rows_needed(self) -> int:
        """Rows of an embedding that texts need: the largest id that can stand in one, and one. T5's file has
        100 special tokens behind its 32,000, which no text holds."""
        special = set(self.special.values())
        # special strings in a text are ordinary text
        ordinary = (number for number in self.engine.sizes if number not in special)
        return 1 + max(*ordinary, *self.start, *self.before, *self.after, self.pad)

    # --- files ---

    def to_json(self) -> bytes:
        """The tokenizer.json: as it was read, or written for a vocabulary of our own once it is proved that
        `tokenizers` reads it as tiktoken does."""
        if self.data is None:
            vocabulary = self.engine.vocabulary
            content = hf.write_byte_level(vocabulary, END_OF_TEXT)
            data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
            # once: each checkpoint writes it again
            if self.foreign or vocabulary.pattern not in (GPT2_PATTERN, BYTE_PATTERN):
                compare(self.engine, data)
            else:
                # the proof needs no library
                assert hf.read_byte_level(content) == vocabulary, self.name
            self.data = data
        return self.data

    def save(self, path: str):
        """Write the tokenizer.json alone: all that is needed to encode and decode."""
        write_atomic(os.fspath(path), self.to_json())

    def files(self, longest: int | None = None) -> dict[str, bytes]:
        """All files of a folder that Hugging Face's AutoTokenizer loads, by name, with what the source had
        beside them. longest: most tokens that the model can read, where the source does not say."""
        config = self._config()
        if longest is not None:
            # transformers warns of a longer text
            config.setdefault("model_max_length", longest)
        text = json.dumps(config, indent=1, ensure_ascii=False)
        return {"tokenizer.json": self.to_json(), **self.files_beside, CONFIG: text.encode()}

    def _config(self) -> dict:
        config = json_beside(self.files_beside, CONFIG)
        for name in NOT_PASSED_ON:
            config.pop(name, None)
        names = dict(zip(self.special.values(), self.special, strict=True))
        defaults = {
            "bos_token": names.get(self.start[0]),
            "eos_token": names[self.eot],
            # transformers 4 hands token_type_ids to models that have none, unless these are named
            "model_input_names": ["input_ids", "attention_mask"],
        }
        config = {**defaults, **self.roles, **config}
        # null in the source, where its generation_config.json or a usual name says it
        config["eos_token"] = config["eos_token"] or defaults["eos_token"]
        # a chat template writes special tokens as text, which must stay what they are
        if chat_template(self.files_beside) is None:
            config["split_special_tokens"] = True
        # The class that takes a tokenizer.json as it stands. transformers 5 would build another one that a
        # source names past the file's own pre-tokenizer: 4 ids where 7 are right.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # otherwise "a , b" would come back as "a, b"
        config["clean_up_tokenization_spaces"] = False
        return config

    # --- which vocabulary it is ---

    def identity(self) -> str:
        """SHA-256 of what decides the ids, whatever file says it: tokens, split pattern, normalizer, special
        tokens, and merges where they decide."""
        return self.engine.identity()

    def matches(self, digest: str) -> bool:
        """Whether a manifest or a checkpoint names this vocabulary: by its identity or, from before there was
        one, by the hash of the file."""
        if digest in (self.identity(), self.old_digest):
            return True
        # earlier versions knew no others
        ours = self.special == {END_OF_TEXT: self.vocab_size - 1}
        if not ours or not isinstance(self.engine, Tiktoken):
            return False
        vocabulary = self.engine.vocabulary
        return digest == old_digest(vocabulary.tokens(), vocabulary.pattern, self.name)
