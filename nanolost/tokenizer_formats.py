"""The formats of a vocabulary that are not Hugging Face's: OpenAI's .tiktoken, which lacks the split pattern,
and our own of earlier versions, whose files and hashes are still about. And what a folder of Hugging Face has
beside its tokenizer.json."""
import base64
import collections
import hashlib
import json

from nanolost.errors import UserError
from nanolost.files import parse_json, read_present
from nanolost.hf_tokenizer import BYTE_PATTERN, CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, SPELLINGS

FILE_LIMIT = 64 << 20                          # bytes; Gemma's, the largest known here, has 33 MB
END_OF_TEXT = "<|endoftext|>"
OLD_FORMAT = "nanolost-tokenizer-1"
# split patterns by the SHA-256 of the .tiktoken file, as tiktoken_ext/openai_public.py pairs them
KNOWN = {
    # r50k_base: GPT-2's
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": GPT2_PATTERN,
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": CL100K_PATTERN,
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": O200K_PATTERN,
}

def check_vocabulary(tokens: list[bytes]):
    """UserError unless each token has a text of its own and each byte has a token."""
    # tiktoken takes all of these and panics, or loses text, at the first text that meets them
    counts = collections.Counter(tokens)
    if b"" in counts:
        raise UserError(f"its token {tokens.index(b'')} is empty")
    if len(counts) < len(tokens):
        (token, times), = counts.most_common(1)
        raise UserError(f"it holds the token {token!r} {times} times")
    missing = [byte for byte in range(256) if bytes([byte]) not in counts]
    # byte-pair encoding starts from single bytes: a text with this one could not be encoded
    if missing:
        raise UserError(f"it has no token for {len(missing)} of the 256 bytes, such as 0x{missing[0]:02x}")

def decoded(token, number: int) -> bytes:
    try:
        # without validate it would skip what is no base64
        return base64.b64decode(token, validate=True)
    except (TypeError, ValueError):
        raise UserError(f"its token {number} is not in base64") from None

def read_tiktoken(data: bytes) -> list[bytes]:
    """The tokens of OpenAI's format, one a line: base64, a space and the rank."""
    # an editor may have put a byte-order mark in front
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    tokens = []
    for line in filter(None, lines):
        # ids are places in a list here: a gap in the ranks would shift all that follow
        words = line.split()
        if len(words) != 2 or words[1] != b"%d" % len(tokens):
            raise UserError(f"where rank {len(tokens)} should follow stands {line[:40]!r}")
        tokens.append(decoded(words[0], len(tokens)))
    return tokens

def known_pattern(tokens: list[bytes]) -> str | None:
    """The split pattern that belongs to the tokens of a .tiktoken file, which does not hold it."""
    # as OpenAI writes the file, whatever an editor has made of its line ends
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    return KNOWN.get(digest)

def read_old(content: dict) -> tuple[list[bytes], str, str]:
    """Tokens, split pattern and name from our earlier format."""
    pattern = content.get("pattern")
    name = content.get("name")
    if not isinstance(pattern, str) or not isinstance(name, str):
        raise UserError("its pattern and name must be texts")
    tokens = content.get("tokens")
    if not isinstance(tokens, list):
        raise UserError("its tokens must be a list")
    return [decoded(token, i) for i, token in enumerate(tokens)], pattern, name

def old_digest(tokens: list[bytes], pattern: str, name: str) -> str:
    """SHA-256 of the file that earlier versions wrote: what their manifests and checkpoints name."""
    tiktokens, *_, byte = SPELLINGS
    before = {GPT2_PATTERN: tiktokens, BYTE_PATTERN: byte}
    content = {
        "format": OLD_FORMAT,
        "name": name,
        "pattern": before.get(pattern, pattern),
        "end_of_text": END_OF_TEXT,
        "tokens": [base64.b64encode(token).decode() for token in tokens],
    }
    # byte for byte as it was written
    text = json.dumps(content, indent=0)
    return hashlib.sha256(text.encode()).hexdigest()

# --- what stands beside a tokenizer.json ---

CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
# what goes along with a vocabulary wherever it goes, unread but for the special tokens
BESIDE = (CONFIG, "special_tokens_map.json", TEMPLATE, GENERATION)
# the entries add_… replace the file's post-processor, and code does not travel
NOT_PASSED_ON = {"add_bos_token", "add_eos_token", "auto_map", "backend", "tokenizer_file"}
# where no file says which special token ends a text, as T5's tokenizer.json often stands alone: the usual
# names, ours first
ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<｜end▁of▁sentence｜>")

def read_beside(folder: str) -> dict[str, bytes]:
    """The files of a folder that say more of its tokenizer."""
    return read_present(folder, BESIDE, FILE_LIMIT)

def json_beside(files: dict[str, bytes], name: str) -> dict:
    return parse_json(files.get(name, b"{}"), name)

def tokens_by_role(files: dict[str, bytes]) -> dict[str, str]:
    """Special tokens by what they are for: "eos_token", "bos_token", "pad_token", …"""
    found = {}
    for name in CONFIG, "special_tokens_map.json":
        for role, token in json_beside(files, name).items():
            # older files describe a token with its flags
            text = token.get("content") if isinstance(token, dict) else token
            if role.endswith("_token") and isinstance(text, str):
                found.setdefault(role, text)
    return found

def end_of_text(special: dict[str, int], roles: dict[str, str]) -> int:
    for text in roles.get("eos_token"), *ENDS:
        if text in special:
            return special[text]
    raise UserError("no file says which token ends a text: put a tokenizer_config.json with an eos_token "
                    "beside it")

def chat_template(files: dict[str, bytes]) -> str | None:
    """The program in jinja2's language that writes a conversation as the model was taught it."""
    if TEMPLATE in files:
        return files[TEMPLATE].decode(errors="replace")
    # older folders keep it here, some of them several by name
    template = json_beside(files, CONFIG).get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        chosen = [entry.get("template") for entry in entries if entry.get("name") == "default"]
        template = chosen[0] if chosen else None
    return template if isinstance(template, str) else None
