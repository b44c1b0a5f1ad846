"""Checkpoints: written as a whole or not at all, verified before use, loaded without a decomposition.

    out/checkpoints/step_00001000/   model.safetensors  config.json  tokenizer.json  tokenizer_config.json
                                     optimizer.safetensors  state.json
                                     update.safetensors (what the weights are the sum of, of a fine-tuning)
                                     modeling_lost.py  lost.py (where a layer needs them)
                                     manifest.json (sha256 of each of the others)

A checkpoint is a temporary folder until one rename names it. It is a Hugging Face model folder as it stands,
and theirs load here. Safetensors and JSON only are read: loading runs nothing."""
import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import sys
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn as nn
from huggingface_hub import split_state_dict_into_shards_factory

from lost import LOSTError
from model import ConfigError, Llama
from nanolost import adapters, shard
from nanolost.errors import UserError, as_user_error
from nanolost.files import (
    ended_by_signals,
    parse_json,
    plain_name,
    read_json,
    sha256_file,
    sync_folder,
)
from nanolost.huggingface import config_from_hf, config_json, travelling_code
from nanolost.job import Alone
from nanolost.methods import rebuild
from nanolost.tensors import TensorFiles, Writer, file_order, write_tensors
from nanolost.tokenizer import Tokenizer

# a save that replaces its own step keeps the old folder as step_…_before until the new one is in place
NAME = re.compile(r"step_([0-9]{8,})(_before(?:_[0-9]+)?)?")
# what a kill leaves of a save or of a deletion
LEFTOVER = re.compile(r"\.tmp_(old_)?step_[0-9]{8,}(_before)?(_[0-9]+)*")

WEIGHTS = "model.safetensors"
MOMENTS = "optimizer.safetensors"
UPDATE = "update.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
# every version of this program has written these beside weights and moments
NEEDED = ("config.json", STATE, "tokenizer.json")
# of more bytes weights, and moments, are several files, which several processes write at once
LONGEST = 10_000_000_000
# state of torch's Adam and AdamW whose root is taken, and every optimizer's count of its steps
NEVER_NEGATIVE = ("step", "exp_avg_sq", "max_exp_avg_sq")

def index_of(name: str) -> str:
    """The list of which tensor is in which file, where there are several in the place of `name`."""
    return f"{name}.index.json"

# Hugging Face's
INDEX = index_of(WEIGHTS)

# --- which folders there are, and whose ---

@functools.cache
def warn_once(line: str):
    """One line on stderr; the same one is not said again."""
    # nobody may be listening any more, which is no reason to end a run
    with contextlib.suppress(OSError):
        print(f"WARNING: {line}", file=sys.stderr, flush=True)

def step_of(folder: str) -> int | None:
    """The step in a checkpoint's name, None for a name that this program does not give."""
    match = NAME.fullmatch(os.path.basename(folder))
    if match is None:
        return None
    step = int(match[1])
    # step_000000012 has a zero too many
    return step if match[1] == f"{step:08d}" else None

def is_aside(folder: str) -> bool:
    """Whether a newer save of the same step has replaced this checkpoint, or was about to."""
    return "_before" in os.path.basename(folder)

def named_folders(out_dir: str) -> list[str]:
    """Folders with a checkpoint's name, oldest first."""
    home = os.path.join(out_dir, "checkpoints")
    found = []
    # a folder of Hugging Face has none of these, a new run not yet
    if os.path.isdir(home):
        paths = [os.path.join(home, name) for name in os.listdir(home)]
        found = [path for path in paths if step_of(path) is not None and os.path.isdir(path)]
    # of two of one step the newer one comes last
    return sorted(found, key=lambda path: (step_of(path), not is_aside(path), path))

def renamed_from(folder: str) -> int | None:
    """The step that a good state.json says where the folder's name says another; None where they agree, or
    nothing can be said."""
    named = step_of(folder)
    if named is None:
        return None
    path = os.path.join(folder, STATE)
    # a damaged one says nothing: the folder is a damaged checkpoint then, not somebody's copy
    with contextlib.suppress(UserError, OSError):
        step = read_json(path).get("step")
        digest = read_json(os.path.join(folder, MANIFEST)).get(STATE)
        if type(step) is int and step != named and sha256_file(path) == digest:
            return step
    return None

def checkpoints(out_dir: str) -> list[str]:
    """Folders of the finished checkpoints, oldest first. A copy under the name of another step is the user's:
    it would be the newest for ever."""
    found = []
    for folder in named_folders(out_dir):
        step = renamed_from(folder)
        if step is None:
            found.append(folder)
        else:
            warn_once(f"{folder} is a copy of step {step} by its {STATE}: it is left alone, and not "
                      "continued from")
    return found

def is_own(folder: str) -> bool:
    """Whether this program wrote the folder: a model of Hugging Face has neither of these files."""
    return any(os.path.exists(os.path.join(folder, name)) for name in (STATE, MOMENTS))

def unused(path: str) -> str:
    """`path`, or with a number behind it where that is taken, by something that could not be deleted."""
    numbered = (f"{path}_{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))

# --- deleting ---

def delete(folder: str):
    """Delete a folder under a temporary name. One that cannot go is a warning, not the end of a run: an
    immutable file, or one that NFS keeps as .nfs… while a reader has it open."""
    try:
        shutil.rmtree(folder)
    except OSError as e:
        # the first failure ended it: whatever else can go makes room
        shutil.rmtree(folder, ignore_errors=True)
        warn_once(f"cannot delete {folder} ({e.strerror or e}): delete it by hand to free its room")

def retire(folder: str):
    """Delete a checkpoint so that a half-deleted one never has a checkpoint's name. OSError if it keeps its
    name: then all of it is there."""
    if os.path.islink(folder) or not is_own(folder):
        raise OSError("it was not written by this program")
    home, name = os.path.split(folder)
    # a name may be taken by what an earlier deletion had to leave
    doomed = unused(os.path.join(home, f".tmp_old_{name}"))
    os.rename(folder, doomed)
    delete(doomed)

def sweep(out_dir: str):
    """Remove what an interrupted save or deletion left."""
    home = os.path.join(out_dir, "checkpoints")
    if not os.path.isdir(home):
        return
    for name in os.listdir(home):
        path = os.path.join(home, name)
        # a link leads to what is not ours
        if LEFTOVER.fullmatch(name) and not os.path.islink(path):
            delete(path)

def retain(out_dir: str, step: int, keep: int):
    """Delete all but the newest `keep` checkpoints up to `step`, and damaged ones of later steps."""
    found = checkpoints(out_dir)
    earlier = [folder for folder in found if step_of(folder) <= step]
    # what a save has put aside is not one of `keep`
    doomed = [folder for folder in earlier if is_aside(folder)]
    doomed += [folder for folder in earlier if not is_aside(folder)][:-keep]
    # the run went back past a damaged one; a good one is a future that nobody has given up
    doomed += [folder for folder in found if step_of(folder) > step and verify(folder)]
    for folder in doomed:
        try:
            retire(folder)
        except OSError as e:
            warn_once(f"{folder} stays, it cannot be deleted ({e.strerror or e})")

# --- verifying ---

def read_manifest(folder: str) -> dict[str, str]:
    """Digest by file name. UserError for a manifest that does not name what every checkpoint has."""
    path = os.path.join(folder, MANIFEST)
    digests = read_json(path)
    # a name with a path in it would have a file outside hashed, or loaded
    for name in digests:
        plain_name(name, path)
    # {} would verify whatever is there
    for name in NEEDED:
        if name not in digests:
            raise UserError(f"{path} does not name {name}")
    for name in (WEIGHTS, MOMENTS):
        if name not in digests and index_of(name) not in digests:
            raise UserError(f"{path} does not name {name}")
    return digests

def verify(folder: str, mine: set[str] | None = None) -> str | None:
    """What is wrong with a checkpoint by its manifest, or None. mine: look at these files alone."""
    try:
        digests = read_manifest(folder)
    except UserError as e:
        return f"{MANIFEST} is missing or damaged: {e}"
    step = renamed_from(folder)
    if step is not None:
        return f"it is a copy of step {step} by its {STATE}: give it that step's name, or one without a step"
    for name, digest in digests.items():
        if mine is not None and name not in mine:
            continue
        try:
            if sha256_file(os.path.join(folder, name)) != digest:
                return f"{name} has changed since it was written"
        except OSError as e:
            return f"{name} cannot be read: {e.strerror}"
    return None

def newest_checkpoint(out_dir: str) -> str | None:
    """The newest checkpoint that verifies, None if there is none at all; damaged ones are named on stderr.
    UserError if all are damaged: training must not silently start again from nothing."""
    found = checkpoints(out_dir)
    for folder in reversed(found):
        fault = verify(folder)
        if fault is None:
            return folder
        # said at each look: it is the user's last chance to save the others
        print(f"WARNING: {folder} is damaged ({fault}): looking for an earlier one", file=sys.stderr)
    # to begin at step 0 is the user's to say
    if found:
        raise UserError(f"all {len(found)} checkpoints of {out_dir} are damaged: restore one, or start "
                        "again with --resume never --overwrite")
    copies = named_folders(out_dir)
    if copies:
        raise UserError(f"{out_dir} has no checkpoint but copies under the names of other steps, such as "
                        f"{copies[-1]}: give that one the name of its step, or use another --out_dir")
    return None

# --- what is in the files ---

def model_tensors(model: Llama) -> dict[str, torch.Tensor]:
    """The state dict under plain names; a tied head is left out, as Hugging Face does."""
    tensors = {name: t.detach() for name, t in model.state_dict().items()}
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
    return tensors

def optimizer_states(model: Llama, optimizers: list) -> dict[str, dict]:
    """By the name of each parameter that is stepped the state that its optimizer keeps, {} for none."""
    names = {p: name for name, p in model.named_parameters()}
    states = {}
    for optimizer in optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            # a frozen parameter has none, and `state[p]` would make it
            states[names[p]] = optimizer.state.get(p, {})
        for key in set(optimizer.state) - set(parameters):
            raise UserError(f"{type(optimizer).__name__} keeps {key!r:.80} beside its parameters' state: a "
                            "checkpoint cannot hold that, use another optimizer")
    return states

def optimizer_tensors(model: Llama, optimizers: list) -> dict[str, torch.Tensor]:
    """The tensors of the optimizers' state as "parameter name.state name", for example
    model.norm.weight.exp_avg."""
    tensors = {}
    for name, state in optimizer_states(model, optimizers).items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                # one counter may serve all parameters: safetensors refuses what is shared
                value = value.clone() if value.dim() == 0 else value
                tensors[f"{name}.{key}"] = value.detach()
    return tensors

def optimizer_values(model: Llama, optimizers: list) -> dict:
    """The rest of the optimizers' state, as JSON: numbers that are no tensors, and the parameters that have
    no state (plain SGD has none at all). UserError for an optimizer that keeps anything else (LBFGS)."""
    kinds = sorted({type(optimizer).__name__ for optimizer in optimizers})
    values = {}
    for name, state in optimizer_states(model, optimizers).items():
        plain = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
        for key, value in plain.items():
            if not isinstance(value, bool | int | float | str | None):
                raise UserError(f"an optimizer ({', '.join(kinds)}) keeps {key} as a {type(value).__name__}: "
                                "a checkpoint holds tensors and numbers, use another optimizer")
        # {} tells a parameter that has no state from one whose state is missing
        if plain or not state:
            values[name] = plain
    return {"optimizers": kinds, "values": values}

# --- saving ---

def write_json(folder: str, name: str, content: dict):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1)

def several(name: str, tensors: dict[str, torch.Tensor], longest: int | str | None):
    """Hugging Face's plan of which tensor is in which file, of at most `longest` bytes ("5GB"), in the place
    of the one file `name`."""
    if longest is None:
        longest = sum(t.nbytes for t in tensors.values()) + 1
    return split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda t: t.nbytes,
        filename_pattern=name.replace(".", "{suffix}.", 1),
        max_shard_size=longest,
    )

def write_index(folder: str, name: str, plan):
    if plan.is_sharded:
        content = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder, index_of(name), content)

def write_weights(folder: str, tensors: dict[str, torch.Tensor], longest: int | str | None):
    """The tensors in one file or, where they have more than `longest` bytes ("5GB"), in several with their
    index, under Hugging Face's names."""
    plan = several(WEIGHTS, tensors, longest)
    for file, names in plan.filename_to_tensors.items():
        write_tensors(folder, file, {name: tensors[name] for name in names}, {"format": "pt"})
    write_index(folder, WEIGHTS, plan)

def write_words(
    folder: str,
    model: Llama,
    tokenizer: Tokenizer,
    travelling: dict[str, bytes],
    dtype: torch.dtype = torch.float32,
):
    """What makes `folder` a model of Hugging Face, without the weights, which are `dtype`: config.json, the
    tokenizer's files, and the code of layers that transformers lacks. travelling: other files by name, from
    the source."""
    with as_user_error(ConfigError):
        name = str(dtype).removeprefix("torch.")
        content = config_json(model, tokenizer.eot, tokenizer.start[0], name)
    files = {**travelling, **tokenizer.files(model.config.max_seq_len)}
    if "auto_map" in content:
        files |= travelling_code()
    os.makedirs(folder)
    for name, data in files.items():
        with open(os.path.join(folder, name), "wb") as f:
            f.write(data)
    write_json(folder, "config.json", content)

def weights_in(model: Llama, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`model_tensors` in `dtype`; what has it already is not copied."""
    tensors = model_tensors(model)
    for name, tensor in tensors.items():
        # channels are whole numbers
        if tensor.is_floating_point():
            tensors[name] = tensor.to(dtype)
    return tensors

def write_model(
    folder: str,
    model: Llama,
    tokenizer: Tokenizer,
    travelling: dict[str, bytes],
    dtype: torch.dtype = torch.float32,
    longest: int | str | None = None,
):
    """`write_words` and the weights, of a model that is not trained further."""
    write_words(folder, model, tokenizer, travelling, dtype)
    write_weights(folder, weights_in(model, dtype), longest)

# --- saving by several processes ---

class Content(NamedTuple):
    """Tensors that belong together, in one file or several, and the note in each."""

    name: str
    tensors: dict[str, torch.Tensor]
    notes: dict[str, str]

class Turn(NamedTuple):
    """A tensor that a process is to write. file: the name of the file; inside: all tensors in there."""

    file: str
    inside: dict[str, torch.Tensor]
    notes: dict[str, str]
    tensor: torch.Tensor

def turns_of(content: Content, plan) -> list[list[Turn]]:
    """The turns of each file, in its order."""
    found = []
    for file, names in plan.filename_to_tensors.items():
        inside = {name: content.tensors[name] for name in names}
        found.append([Turn(file, inside, content.notes, inside[name]) for name in file_order(inside)])
    return found

class Writing:
    """What one process writes of a checkpoint. digests: of its files; fault: what the disk said, if it did
    not take one."""

    def __init__(self, folder: str):
        self.folder = folder
        self.writer = None
        self.name = None
        self.digests = {}
        self.fault = None

    def put(self, turn: Turn, tensor: torch.Tensor):
        # the others count on this process in their exchanges, whatever its disk says
        if self.fault is not None:
            return
        try:
            if turn.file != self.name:
                self.close()
                self.name = turn.file
                self.writer = Writer(os.path.join(self.folder, turn.file), turn.inside, turn.notes)
            self.writer.put(tensor)
        except OSError as e:
            self.fault = str(e)

    def close(self):
        """The end of a file, which is on the disk for certain then."""
        if self.writer is None:
            return
        try:
            self.digests[self.name] = self.writer.close()
        except OSError as e:
            self.fault = self.fault or str(e)
        self.writer = None

def write_turns(folder: str, queues: list[list[Turn]], job) -> Writing:
    """Write the queue of this process. What is split is sent to who writes it, in one order: a process holds
    the one tensor that it is to write."""
    mine = Writing(folder)
    for turns in itertools.zip_longest(*queues):
        # a disk may take longer than an exchange of tensors is waited for
        if any(turn is not None and shard.is_split(turn.tensor) for turn in turns):
            job.wait()
        held = None
        for number, turn in enumerate(turns):
            if turn is None:
                continue
            tensor = shard.collected(turn.tensor, number)
            if number == job.rank:
                held = turn, tensor.cpu()
            del tensor
        # all at once
        if held is not None:
            mine.put(*held)
    mine.close()
    return mine

def sync_files(folder: str):
    """fsync a folder and its files: a rename that reaches the disk before them would name one of zeros."""
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as f:
            os.fsync(f.fileno())
    sync_folder(folder)

def contents_of(whole: Llama, model: Llama, optimizers: list) -> list[Content]:
    """What a checkpoint of `model` holds in tensors. whole: the same with its updates merged."""
    # an optimizer that is refused leaves nothing behind: nothing is written yet
    notes = {"nanolost": json.dumps(optimizer_values(model, optimizers), sort_keys=True)}
    # a resume goes on bit for bit
    found = [Content(WEIGHTS, weights_in(whole, torch.float32), {"format": "pt"})]
    parts = adapters.parts(model)
    if parts:
        found.append(Content(UPDATE, parts, {"format": "pt"}))
    return [*found, Content(MOMENTS, optimizer_tensors(model, optimizers), notes)]

def write(
    folder: str,
    model: Llama,
    optimizers: list,
    state: dict,
    tokenizer: Tokenizer,
    travelling: dict[str, bytes],
    job,
) -> set[str]:
    """All files of a checkpoint and their manifest, on the disk for certain when it returns: the names of
    those that this process is to read back."""
    writers = job.world
    whole = model
    if adapters.updates(model):
        # a second copy of the weights, which one process makes and writes
        writers = 1
        if job.rank == 0:
            whole = adapters.merged(model)
    contents = contents_of(whole, model, optimizers)
    job.first(lambda: write_words(folder, whole, tokenizer, travelling))
    plans = [several(c.name, c.tensors, LONGEST) for c in contents]
    files = [file for c, plan in zip(contents, plans, strict=True) for file in turns_of(c, plan)]
    queues = [list(itertools.chain(*files[number::writers])) for number in range(writers)]
    mine = write_turns(folder, queues, job)
    written = job.gather((mine.digests, mine.fault), patient=True)
    for _, fault in written:
        if fault is not None:
            raise OSError(fault)
    def finish():
        for content, plan in zip(contents, plans, strict=True):
            write_index(folder, content.name, plan)
            # an optimizer without state still has a name
            if not content.tensors:
                write_tensors(folder, *content)
        write_json(folder, STATE, state)
        digests = {}
        for found, _ in written:
            digests |= found
        # the others are hashed once as written, before the fsync, and once as read back from the final name
        for name in sorted(set(os.listdir(folder)) - set(digests)):
            digests[name] = sha256_file(os.path.join(folder, name))
        write_json(folder, MANIFEST, dict(sorted(digests.items())))
        sync_files(folder)
    job.first(finish)
    # rank 0 has written what no list of digests has, and reads that too
    if job.rank == 0:
        return set(os.listdir(folder)) - {name for found, _ in written[1:] for name in found}
    return set(mine.digests)

def put_in_place(temporary: str, final: str):
    """Give a written checkpoint its name. One that has the name already steps aside first: between the two
    renames that one counts."""
    if os.path.lexists(final):
        os.rename(final, unused(f"{final}_before"))
    os.rename(temporary, final)
    # the second, since the folder of the checkpoints may be as new as its first one
    home = os.path.dirname(final)
    sync_folder(home)
    sync_folder(os.path.dirname(home))

def read_back(final: str, mine: set[str], job):
    """OSError on all processes for a checkpoint that is not what was written. mine: files that this process
    is to read, which it has written."""
    # rank 0 alone looks at the folder itself
    found = verify(final, mine) if mine or job.rank == 0 else None
    for fault in job.gather(found, patient=True):
        if fault is not None:
            raise OSError(f"{final} does not read back as it was written ({fault}): is the disk failing?")

def save_checkpoint(
    out_dir: str,
    step: int,
    model: Llama,
    optimizers: list,
    state: dict,
    tokenizer: Tokenizer,
    keep: int,
    travelling: dict[str, bytes] | None = None,
    job=None,
) -> str:
    """Write the checkpoint of `step`; once it verifies, keep only the newest. Returns its folder. OSError if
    the disk does not take it: then its part is removed and the earlier ones stay. travelling: files by name
    that the model came with and that nobody here reads, written as they are. All processes of `job` call."""
    job = job or Alone()
    home = os.path.join(out_dir, "checkpoints")
    final = os.path.join(home, f"step_{step:08d}")
    # a folder that an earlier start could not sweep is in nobody's way
    temporary = job.first(lambda: unused(os.path.join(home, f".tmp_step_{step:08d}")))
    try:
        mine = write(temporary, model, optimizers, state, tokenizer, travelling or {}, job)
        job.first(lambda: put_in_place(temporary, final))
        read_back(final, mine, job)
    except ConnectionError:
        # nobody is left to agree with; the next start sweeps
        raise
    except OSError as e:
        # on a full disk the part that was written would keep it full
        job.first(lambda: shutil.rmtree(temporary, ignore_errors=True))
        # with an update its parts, which are about as large as the merged weights
        tensors = model_tensors(model) | adapters.parts(model) | optimizer_tensors(model, optimizers)
        need = sum(t.nbytes for t in tensors.values())
        free = shutil.disk_usage(out_dir).free
        raise OSError(f"cannot save {final}: {e}. It takes {need:,} bytes, {free:,} are free. The earlier "
                      "checkpoints are whole: make room, or the folder writable, and the same command "
                      "continues") from None
    # only now: until here an earlier one may have been the last good one
    job.first(lambda: retain(out_dir, step, keep))
    return final

# --- a folder of a model alone ---

# auto: what the source has
SAVE_DTYPES = ["auto", "float32", "bfloat16", "float16"]

def check_free(place: str):
    """UserError for an --out_dir that is taken: nothing is ever overwritten."""
    if not place:
        raise UserError("--out_dir is empty: name a folder")
    # a link to a folder is not what a rename replaces
    if os.path.islink(place) or os.path.exists(place) and not os.path.isdir(place):
        raise UserError(f"{place} is no folder: use another --out_dir")
    if os.path.isdir(place) and os.listdir(place):
        raise UserError(f"{place} is not empty: use another --out_dir")
    home = os.path.dirname(os.path.abspath(place))
    # what is to be made is made there in the end, maybe after hours
    while not os.path.lexists(home):
        home = os.path.dirname(home)
    if not os.path.isdir(home) or not os.access(home, os.W_OK):
        raise UserError(f"cannot write {place}, since {home} is no folder that you may write: use another "
                        "--out_dir")

def saved_dtype(folder: str, name: str) -> torch.dtype:
    """That of SAVE_DTYPES which is meant for a model from `folder`."""
    # read as float32, whatever the folder has
    return weights_dtype(folder) if name == "auto" else getattr(torch, name)

def check_range(model: Llama, dtype: torch.dtype):
    """UserError for weights that would become infinite: float16 ends at 65504."""
    largest = torch.finfo(dtype).max
    for name, p in model.named_parameters():
        if p.abs().max() > largest:
            raise UserError(f"{name} has elements beyond {dtype}: use --save_dtype bfloat16")

def write_whole(out_dir: str, write):
    """write(folder) into a folder beside `out_dir`, which then gets its name. Whatever ends it early leaves
    nothing behind."""
    final = os.path.abspath(out_dir)
    home = os.path.dirname(final)
    # SIGKILL leaves this name, which says what it is
    temporary = unused(f"{final}.tmp")
    with ended_by_signals():
        try:
            os.makedirs(home, exist_ok=True)
            write(temporary)
            sync_files(temporary)
            # an empty folder may be in the place
            os.rename(temporary, final)
        except OSError as e:
            raise UserError(f"cannot write {out_dir} ({e}): use another --out_dir, or make room") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    # without this a power cut may undo the rename
    sync_folder(home)

# --- loading ---

def read_part(files: TensorFiles, name: str, like: torch.Tensor) -> torch.Tensor:
    """A tensor of some files, laid out as `like` is: of a split one only this process's rows are read."""
    if not shard.is_split(like) or files.shape(name).shape != like.shape:
        return files.read(name)
    return shard.split_like(files.read(name, shard.rows(like)).to(shard.local(like).device), like)

def saved_states(folder: str, parameters: dict[str, nn.Parameter]) -> tuple[list | None, dict[str, dict]]:
    """The optimizers' names (None in files from before they were kept), and the state by parameter. Of the
    state of a split parameter, by its name in `parameters`, this process reads its rows."""
    files = tensor_files(folder, MOMENTS)
    path = os.path.join(folder, MOMENTS)
    # the same in each of several files
    notes = files.notes(next(iter(files.where.values()), path)).get("nanolost", "{}")
    content = parse_json(notes.encode(), path)
    # files from before there were notes have neither
    kinds = content.get("optimizers")
    values = content.get("values", {})
    if not isinstance(values, dict) or not all(isinstance(state, dict) for state in values.values()):
        raise UserError(f"cannot read {path}: its numbers do not stand by parameter")
    states = dict(values)
    for name in files:
        # names of parameters have dots, torch's names of their state have none
        parameter, _, key = name.rpartition(".")
        like = parameters.get(parameter)
        tensor = files.read(name) if like is None else read_part(files, name, like)
        states.setdefault(parameter, {})[key] = tensor
    return kinds, states

def state_made(optimizer: torch.optim.Optimizer, group: dict, p: nn.Parameter) -> dict:
    """The state that `optimizer` itself makes for a parameter like `p`, of `group`, in a step of zeros: keys,
    shapes, dtypes and devices. Takes the memory of one more such parameter with its gradient and state."""
    # Adagrad makes it in its constructor
    if optimizer.state.get(p):
        return optimizer.state[p]
    like = nn.Parameter(torch.zeros_like(p))
    like.grad = torch.zeros_like(p)
    groups = optimizer.param_groups
    states = optimizer.state
    # no copy of the optimizer: torch's leaves out what a class of one's own keeps beside groups and state
    optimizer.param_groups = [{**group, "params": [like]}]
    optimizer.state = defaultdict(dict)
    try:
        optimizer.step()
        return optimizer.state[like]
    finally:
        optimizer.param_groups = groups
        optimizer.state = states

def misfit(value, made) -> str | None:
    """Why `value` cannot stand where an optimizer keeps `made`, None if it can."""
    if type(value) is not type(made):
        return f"is a {type(value).__name__}, not a {type(made).__name__}"
    if not isinstance(value, torch.Tensor):
        return None
    # torch's fused kernels trust the sizes, and write past the end of a tensor that is too small
    if value.shape != made.shape:
        return f"is {list(value.shape)}, not {list(made.shape)}"
    if value.dtype != made.dtype:
        return f"is {value.dtype}, not {made.dtype}"
    return None

def impossible(key: str, value) -> str | None:
    """Why no optimizer has the numbers `value` as its state `key`, None if one may."""
    if not isinstance(value, torch.Tensor | int | float):
        return None
    numbers = shard.local(value)
    # a note of JSON, where Python reads NaN and Infinity too
    if not isinstance(value, torch.Tensor):
        numbers = torch.tensor(float(value))
    # a moment may overflow in a run that goes on, a count may not
    if numbers.isnan().any() or (numbers.dim() == 0 and numbers.isinf()):
        return "is not finite"
    if key in NEVER_NEGATIVE and (numbers < 0).any():
        return "is negative"
    return None

def fitting(saved: dict, made: dict, later: set[str], p: nn.Parameter) -> dict:
    """The saved state of `p` on the devices where its optimizer keeps it, as in `made`. later: keys that it
    may have besides. UserError for what its optimizer cannot have written."""
    for key in made:
        if key not in saved:
            raise UserError(f"{key} is missing")
    state = {}
    for key, value in saved.items():
        if key not in made and key not in later:
            raise UserError(f"{key!r:.40} is no state of this optimizer")
        wanted = made.get(key)
        # what comes after the first step is one number, or one for each weight
        if wanted is None and isinstance(value, torch.Tensor):
            wanted = p.detach() if value.dim() else p.detach().new_zeros(())
        fault = impossible(key, value)
        if wanted is not None:
            fault = misfit(value, wanted) or fault
        if fault is not None:
            raise UserError(f"{key!r:.40} {fault}")
        # a step that no kernel reads stays on the CPU: each read of one on a GPU would wait for all work
        if isinstance(value, torch.Tensor):
            value = value.to(wanted.device)
        state[key] = value
    return state

def common_keys(optimizer: torch.optim.Optimizer, states: dict[nn.Parameter, dict]) -> set[str]:
    """Keys that the state of each trained parameter of an optimizer has."""
    # an optimizer may keep more from a later step on, but not for one parameter alone
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    every = [set(states[p]) for p in parameters if p.requires_grad]
    if not every:
        return set()
    return set.intersection(*every)

def restore_optimizer(optimizer: torch.optim.Optimizer, states: dict[nn.Parameter, dict], names: dict):
    """Give each parameter of one optimizer its state. UserError, by `names`, for one that does not fit."""
    later = common_keys(optimizer, states)
    restored = {}
    for group in optimizer.param_groups:
        # a model has many parameters of few shapes
        made = {}
        for p in group["params"]:
            kind = p.shape, p.dtype
            if kind not in made:
                made[kind] = state_made(optimizer, group, p)
            # a frozen one need not have any
            if states[p] or p.requires_grad:
                with as_user_error(UserError, prefix=f"the state of {names[p]}: "):
                    restored[p] = fitting(states[p], made[kind], later, p)
    optimizer.state.update(restored)

def load_optimizer(folder: str, model: Llama, optimizers: list):
    """Put the saved state back. UserError if it is the state of other optimizers or of another model, or has
    what these optimizers cannot have written."""
    kinds, states = saved_states(folder, dict(model.named_parameters()))
    path = path_of(folder, MOMENTS)
    now = sorted({type(optimizer).__name__ for optimizer in optimizers})
    # an optimizer without state would take any other's, and any other would start anew from its
    if kinds not in (None, now):
        raise UserError(f"{folder} has the optimizer state of {kinds!r:.80}, not of {now}: train with "
                        "the --optimizer that the run began with")
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        mine = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            if names[p] not in states:
                raise UserError(f"{folder} has no optimizer state for {names[p]}: train with "
                                "the --optimizer that the run began with")
            # what is left at the end is nobody's
            mine[p] = states.pop(names[p])
        with as_user_error(UserError, prefix=f"{path} does not fit, use an earlier checkpoint: "):
            restore_optimizer(optimizer, mine, names)
    for name in states:
        raise UserError(f"{path} has state for {name!r:.80}, which is no parameter that is trained: use an "
                        "earlier checkpoint")

def checkpoint_folder(path: str) -> str:
    """The folder with a model's files: `path` itself, or the newest good checkpoint of the out_dir `path`."""
    refused = ("pickled checkpoints are refused, since loading one can run any code: where you trust it, "
               "convert it to safetensors, in transformers by from_pretrained(OLD).save_pretrained(NEW)")
    if os.path.isfile(path):
        raise UserError(f"{path} is a file: give an out_dir or a checkpoint folder ({refused})")
    # ours is checked first: a truncated file must not pass for a model from elsewhere
    if is_own(path):
        fault = verify(path)
        if fault is not None:
            raise UserError(f"{path} is damaged: {fault}; use an earlier checkpoint")
        return path
    if any(os.path.exists(os.path.join(path, name)) for name in (WEIGHTS, INDEX)):
        return path
    folder = newest_checkpoint(path)
    if folder is None:
        raise UserError(f"no checkpoint in {path}: give an out_dir or a checkpoint folder ({refused})")
    return folder

def read_index(folder: str, name: str = WEIGHTS) -> dict[str, str]:
    """File name by tensor name, from the index of what has several files in the place of `name`."""
    path = os.path.join(folder, index_of(name))
    # beside it stands metadata: a total size that nothing here needs
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"cannot read {path}: it has no weight_map")
    for file in weight_map.values():
        plain_name(file, path)
    return weight_map

def tensor_files(folder: str, name: str = WEIGHTS) -> TensorFiles:
    """The tensors that a folder has in the file `name`, or in several in its place, and in no other file that
    lies beside them: of ours what the manifest names, of Hugging Face's model.safetensors, else what the
    index names, each tensor from the file it says."""
    # model_ema.safetensors and the like are somebody's own: never guess by a pattern
    files = read_manifest(folder) if is_own(folder) else os.listdir(folder)
    if name in files:
        return TensorFiles.of(os.path.join(folder, name))
    index = index_of(name)
    if index not in files:
        raise UserError(f"{folder} has no {name}: give an out_dir or a checkpoint folder")
    weight_map = read_index(folder, name)
    where = {}
    for file in sorted(set(weight_map.values())):
        if file not in files:
            raise UserError(f"{folder} lacks {file}, which {index} names: copy that file beside it")
        content = TensorFiles.of(os.path.join(folder, file))
        # a tensor that lies in two files is the one that the index says
        for tensor in weight_map:
            if weight_map[tensor] == file and tensor not in content:
                raise UserError(f"{folder}: {file} lacks {tensor}, which {index} promises: bring the files "
                                "of one download")
            if weight_map[tensor] == file:
                where[tensor] = content.where[tensor]
    return TensorFiles(where)

def path_of(folder: str, name: str) -> str | None:
    """The path of the file `name`, or of the index of several in its place; None where there is neither."""
    paths = [os.path.join(folder, file) for file in (name, index_of(name))]
    return next(filter(os.path.exists, paths), None)

def weights_dtype(folder: str) -> torch.dtype:
    """The dtype that a folder keeps its weights in, by the one that every model has."""
    name = "model.embed_tokens.weight"
    file = WEIGHTS
    if not os.path.exists(os.path.join(folder, WEIGHTS)):
        file = read_index(folder).get(name, WEIGHTS)
    files = TensorFiles.of(os.path.join(folder, file))
    if name not in files:
        raise UserError(f"cannot read {os.path.join(folder, file)}: it has no {name}")
    return files.shape(name).dtype

def empty_model(content: dict, folder: str) -> Llama:
    """The model that a config.json describes, shapes only. UserError for one that cannot be."""
    layers = content.get("lost", {})
    if not isinstance(layers, dict):
        raise UserError(f"{folder}: config.json: lost must be an object of layers")
    try:
        with torch.device("meta"):
            model = Llama(config_from_hf(content))
            rebuild(model, layers)
    except (ConfigError, LOSTError, UserError, RuntimeError) as e:
        # RuntimeError is torch's, for sizes of more than 64 bits; its own frames begin in the second line
        raise UserError(f"{folder}: {str(e).partition(chr(10))[0]}") from None
    return model

def check_fit(tensors: dict[str, torch.Tensor], model: Llama, folder: str):
    """UserError for tensors that are not exactly those of the model's state dict."""
    expected = model.state_dict()
    faults = [f"{name} is not in the model" for name in tensors if name not in expected]
    for name, wanted in expected.items():
        found = tensors.get(name)
        if found is None:
            faults.append(f"{name} is missing")
        elif found.shape != wanted.shape:
            faults.append(f"{name} is {list(found.shape)}, not {list(wanted.shape)}")
        elif found.dtype != wanted.dtype:
            faults.append(f"{name} is {found.dtype}, not {wanted.dtype}")
    # three say what is wrong; a model of other sizes differs in hundreds
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"the weights in {folder} do not fit its config.json: {'; '.join(faults[:3])}{more}")

# old folders of Hugging Face keep this table, which follows from the sizes
TABLE = "rotary_emb.inv_freq"

def kept_shapes(files: TensorFiles) -> dict[str, torch.Tensor]:
    """What a folder's weights are, as they are loaded: shapes alone."""
    found = {}
    for name in files:
        if not name.endswith(TABLE):
            tensor = files.shape(name)
            found[name] = tensor.float() if tensor.is_floating_point() else tensor
    return found

def check_head(files: TensorFiles, folder: str):
    """UserError for a tied head that has weights of its own; a copy is harmless. transformers would use them,
    whatever config.json says."""
    names = "model.embed_tokens.weight", "lm_head.weight"
    if not all(name in files for name in names):
        return
    words, _ = files.shape(names[0]).shape
    # some rows at a time
    for first in range(0, words, 4096):
        part = slice(first, first + 4096)
        one, other = (files.read(name, part) for name in names)
        if not torch.equal(one, other):
            raise UserError(f"{folder}: its weights hold a head of their own, and tie_word_embeddings in "
                            "config.json is true: set it to false there")

def fitting_files(folder: str, model: Llama) -> TensorFiles:
    """The weights that a folder has for `model`, of which shapes alone are looked at. UserError if they are
    not exactly its."""
    files = tensor_files(folder)
    shapes = kept_shapes(files)
    tied = model.config.tie_embeddings
    if tied and "model.embed_tokens.weight" in shapes:
        shapes.setdefault("lm_head.weight", shapes["model.embed_tokens.weight"])
    check_fit(shapes, model, folder)
    if tied:
        check_head(files, folder)
    return files

def load_folder(folder: str, split=None) -> tuple[Llama, dict]:
    """`load_model` of a checkpoint folder that is known to be good. split(model): splits its matrices over
    processes, and gives them memory; of those only this process's rows are read then."""
    model = empty_model(read_json(os.path.join(folder, "config.json")), folder)
    files = fitting_files(folder, model)
    tied = model.config.tie_embeddings
    if split is not None:
        split(model)
    tensors = {}
    for name, own in model.state_dict().items():
        # the embedding under a second name: of many words the largest tensor, and read once
        if tied and name == "lm_head.weight":
            continue
        tensor = files.read(name, shard.rows(own))
        if tensor.is_floating_point():
            tensor = tensor.float()
        if shard.is_split(own):
            shard.local(own).copy_(tensor)
            tensor = own
        tensors[name] = tensor
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    # a layer may refuse what its shapes allow, such as an index of a channel that it does not have
    with as_user_error(LOSTError, RuntimeError, prefix=f"{folder}: "):
        model.load_state_dict(tensors, assign=split is None)
    model.tie_head()
    # a model alone has none, which is no state to train on but enough to sample from
    path = os.path.join(folder, STATE)
    return model, read_json(path) if os.path.exists(path) else {}

def load_parts(folder: str, model: Llama, *switches):
    """Take the model of a checkpoint apart into frozen weights and updates, where it was saved with some.
    switches: those of `adapters.restore`. UserError for a file that does not fit."""
    path = path_of(folder, UPDATE)
    if path is None:
        return
    files = tensor_files(folder, UPDATE)
    parts = {name: files.read(name) for name in files}
    with as_user_error(AttributeError, KeyError, RuntimeError, prefix=f"{path} does not fit: "):
        adapters.restore(model, parts, *switches)

def load_model(path: str) -> tuple[Llama, dict]:
    """Model and state.json (empty for a folder of Hugging Face) from an out_dir or a checkpoint folder, on
    the CPU in float32. Nothing is decomposed. UserError if anything does not fit."""
    return load_folder(checkpoint_folder(path))

def load_with_tokenizer(folder: str) -> tuple[Llama, Tokenizer, dict]:
    """`load_folder`, not to be trained, with the tokenizer beside it: (model, tokenizer, state). UserError
    where they do not belong together."""
    # before the weights, which take longer to read and to refuse
    tokenizer = Tokenizer.load(os.path.join(folder, "tokenizer.json"))
    model, state = load_folder(folder)
    rows = model.config.vocab_size
    # an id without a row ends in an index error, or on a GPU in worse
    needed = tokenizer.rows_needed()
    if rows < needed:
        raise UserError(f"{folder}: the tokenizer has {needed} tokens, the model only {rows}: "
                        "give the folder the tokenizer.json that the model was trained with")
    return model.eval(), tokenizer, state
