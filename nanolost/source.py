"""What a run starts from, by --init_from: a folder of Hugging Face or one of our checkpoints, which gives
weights, sizes, kinds of layers and tokenizer.

The folder is needed once: a run that has a checkpoint of its own finds all of it there."""
import contextlib
import dataclasses
import os

import torch

from model import Llama
from nanolost.checkpoint import STATE, checkpoint_folder, checkpoints, empty_model, load_folder
from nanolost.errors import UserError
from nanolost.files import read_json
from nanolost.huggingface import travelling_files
from nanolost.methods import METHODS, keep_function, settings_of
from nanolost.settings import Config, MethodFlags, ModelFlags, saved_value

# tokens of a training window, unless more are asked for: a folder may say 131072
WINDOW = 1024
# sizes of a Config that the folder decides
SIZES = tuple(f.name for f in dataclasses.fields(ModelFlags) if f.name not in ("model", "init_std"))

# --- a run that has begun so ---

def own_checkpoint(out_dir: str, resume: str, name="init_from", kind=str) -> tuple[str | None, dict]:
    """The newest checkpoint of a run that began with the flag `name`, and its settings, in which that is of
    type `kind`; (None, {}) without one. Whether all of it is good is for the resume to say."""
    if resume == "never":
        return None, {}
    home = out_dir if resume == "auto" else resume
    folders = [home, *reversed(checkpoints(home))]
    for folder in folders:
        # a damaged one is no reason to ask for the folder that the run once began with
        with contextlib.suppress(UserError):
            saved = read_json(os.path.join(folder, STATE)).get("config")
            if isinstance(saved, dict) and isinstance(saved.get(name), kind):
                return folder, saved
    return None, {}

def remembered(given: dict) -> dict:
    """The flags that were typed; where they go on with a run that began with --init_from and do not say so,
    with those that it cannot be understood without."""
    # who names a model means another run
    if "init_from" in given or "model" in given:
        return given
    place = given.get("out_dir", Config.out_dir)
    _, saved = own_checkpoint(place, given.get("resume", Config.resume))
    known = {}
    for name in ("init_from", "steps", "seq_len", "seed", "optimizer", "freeze"):
        if saved.get(name) is not None:
            known[name] = saved_value(saved, name)
    return {**known, **given}

# --- what one begins with ---

class Source:
    """The folder that a run starts from, and what is made of it. saved: where it is a checkpoint of the run
    itself, the settings in there."""

    def __init__(self, folder: str, saved: dict | None = None):
        self.folder = folder
        self.saved = saved or {}
        # whether linear layers are to be replaced
        self.converts = False
        self.shapes = self.empty()

    @classmethod
    def of(cls, config: Config) -> "Source | None":
        """What --init_from names, and what it decides filled into `config`. UserError where it is not there,
        or does not go with what was typed."""
        if config.init_from is None:
            return None
        # one name for it, whatever folder the command is typed in
        config.init_from = os.path.abspath(config.init_from)
        folder, saved = own_checkpoint(config.out_dir, config.resume)
        source = cls(folder or checkpoint_folder(config.init_from), saved)
        source.settle(config)
        return source

    def settle(self, config: Config):
        sizes = self.shapes.config
        for name in SIZES:
            setattr(config, name, getattr(sizes, name))
        config.tokenizer = self.folder
        limit = sizes.max_seq_len
        if config.seq_len is None:
            config.seq_len = saved_value(self.saved, "seq_len", min(WINDOW, limit))
        # the model has never seen such positions
        if config.seq_len > limit:
            raise UserError(f"--seq_len {config.seq_len} is above the {limit} tokens that the model in "
                            f"{self.folder} was made for: use {limit} or less")
        self.settle_layers(config)

    def settle_layers(self, config: Config):
        kinds = {layer["kind"] for layer in settings_of(self.shapes).values()}
        if config.linear is None:
            # a name for tables: what a layer is stands in the folder, beside its name
            config.linear = min(kinds, default="dense")
            for name in (f.name for f in dataclasses.fields(MethodFlags)):
                # a kind that another command made is no --linear that could be typed
                if self.saved.get(name) not in (None, getattr(config, name)):
                    setattr(config, name, saved_value(self.saved, name))
            return
        if kinds and not self.saved:
            there = " and ".join(sorted(kinds))
            raise UserError(f"--linear {config.linear}: {self.folder} has {there} layers already; leave "
                            "--linear out to train those")
        method = METHODS[config.linear]
        self.converts = method.convert is not None and not self.saved
        if config.rank is None and "rank" in method.uses:
            config.rank = self.quarter()

    def quarter(self) -> int | dict:
        """Rank of a decomposition: a quarter of the width, as LOST's at 60m."""
        quarter = max(1, self.shapes.config.n_embd // 4)
        few = self.shapes.model["layers"][0].self_attn.k_proj.out_features
        # at full rank nothing is left to choose channels by
        if few > quarter:
            return quarter
        half = max(1, few // 2)
        return {"k_proj": half, "v_proj": half, "default": quarter}

    def empty(self) -> Llama:
        """The model as it stands in the folder, shapes only. UserError for one that is not computed here."""
        return empty_model(read_json(os.path.join(self.folder, "config.json")), self.folder)

    def build(self, config: Config, device="meta", part: tuple[int, int] = (0, 1)) -> Llama:
        """The model of step 0 on `device`; on the meta device shapes only."""
        if str(device) == "meta":
            model = self.empty()
        else:
            model, _ = load_folder(self.folder)
        model.to(device)
        if self.converts:
            # of random factors and channels, where they are asked for
            torch.manual_seed(config.seed)
            METHODS[config.linear].convert(model, config, part)
            keep_function(model, config)
        return model

    def travelling(self) -> dict[str, bytes]:
        """Files by name that go on unchanged into the checkpoints."""
        return travelling_files(self.folder)
