"""Checkpoints: written as a whole or not at all, verified before use, loaded without a decomposition.

    out/checkpoints/step_00001000/   model.safetensors  optimizer.safetensors  config.json  state.json
                                     tokenizer.json  manifest.json (sha256 of each of the others)

A checkpoint is a temporary folder until one rename names it. That of a dense model is a Hugging Face model
folder as it stands, and theirs load here. Safetensors and JSON only: loading runs nothing."""
import glob
import json
import os
import shutil
import sys

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lost import LOSTLinear
from model import Llama, LlamaConfig
from nanolost.files import sha256_file, sync_folder
from nanolost.tokenizer import Tokenizer

def checkpoints(out_dir: str) -> list[str]:
    """Folders of the finished checkpoints, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(out_dir), "checkpoints", "step_*")))

def sweep(out_dir: str):
    """Remove what an interrupted save or deletion left."""
    for leftover in glob.glob(os.path.join(glob.escape(out_dir), "checkpoints", ".tmp_*")):
        shutil.rmtree(leftover)

def remove(folder: str):
    """Delete a checkpoint so that a half-deleted one never has a checkpoint's name."""
    doomed = os.path.join(os.path.dirname(folder), ".tmp_old_" + os.path.basename(folder))
    os.rename(folder, doomed)
    shutil.rmtree(doomed)

def save_checkpoint(out_dir: str, step: int, model: Llama, optimizers: list, state: dict,
                    tokenizer: Tokenizer, keep: int) -> str:
    """Write the checkpoint of `step`; once it verifies, keep only the newest. Returns its folder. OSError if
    the disk does not take it: then its part is removed and the earlier ones stay."""
    final = os.path.join(out_dir, "checkpoints", f"step_{step:08d}")
    folder, aside = os.path.join(out_dir, "checkpoints", f".tmp_step_{step:08d}"), f"{final}_before"
    try:
        write(folder, model, optimizers, state, tokenizer)
        if os.path.exists(final) and verify(final):
            remove(final)
        elif os.path.exists(final):            # of before its evaluation: counts until the new one is there
            if os.path.exists(aside):
                remove(aside)
            os.rename(final, aside)
        os.rename(folder, final)
        sync_folder(os.path.dirname(final))
        sync_folder(out_dir)
        if fault := verify(final):
            raise OSError(f"{final} does not read back as it was written ({fault}): is the disk failing?")
    except (OSError, SafetensorError) as e:
        shutil.rmtree(folder, ignore_errors=True)
        tensors = model_tensors(model) | optimizer_tensors(model, optimizers)
        need, free = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(out_dir).free
        raise OSError(f"cannot save {final}: {e}. It takes {need:,} bytes, {free:,} are free. The earlier "
                      "checkpoints are whole: make room, or the folder writable, and the same command "
                      "continues") from None
    kept = [folder for folder in checkpoints(out_dir) if folder <= final][-keep:]
    for old in checkpoints(out_dir):           # later ones go too: damaged, or of a future that was given up
        if old not in kept:
            remove(old)
    return final

def write(folder: str, model: Llama, optimizers: list, state: dict, tokenizer: Tokenizer):
    """All files of a checkpoint and their manifest, on the disk for certain when it returns."""
    os.makedirs(folder)
    save_file(model_tensors(model), os.path.join(folder, "model.safetensors"), {"format": "pt"})
    save_file(optimizer_tensors(model, optimizers), os.path.join(folder, "optimizer.safetensors"))
    write_json(folder, "config.json", config_json(model, tokenizer.eot))
    write_json(folder, "state.json", state)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    digests = {file: sha256_file(os.path.join(folder, file)) for file in sorted(os.listdir(folder))}
    write_json(folder, "manifest.json", digests)
    for file in os.listdir(folder):
        with open(os.path.join(folder, file), "rb") as f:
            os.fsync(f.fileno())
    sync_folder(folder)

def write_json(folder: str, name: str, content: dict):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1)

def read_json(folder: str, name: str) -> dict:
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read {os.path.join(folder, name)}: {e}") from None

def verify(folder: str) -> str | None:
    """What is wrong with a checkpoint by its manifest, or None."""
    try:
        for file, digest in read_json(folder, "manifest.json").items():
            if sha256_file(os.path.join(folder, file)) != digest:
                return f"{file} has changed since it was written"
    except (ValueError, AttributeError):
        return "manifest.json is missing or damaged"
    except OSError as e:
        return f"{file} cannot be read: {e.strerror}"
    return None

def newest_checkpoint(out_dir: str) -> str | None:
    """The newest checkpoint that verifies, None if there is none at all; damaged ones are named on stderr.
    Raises ValueError if all are damaged: training must not silently start again from nothing."""
    found = checkpoints(out_dir)
    for folder in reversed(found):
        if (fault := verify(folder)) is None:
            return folder
        print(f"WARNING: {folder} is damaged ({fault}): looking for an earlier one", file=sys.stderr)
    if found:
        raise ValueError(f"all {len(found)} checkpoints of {out_dir} are damaged: restore one, or start "
                         "again with --resume never --overwrite")
    return None

# --- what is in the files ---

def model_tensors(model: Llama) -> dict[str, torch.Tensor]:
    """The state dict under plain names; a tied head is left out, as Hugging Face does."""
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
    return tensors

def config_json(model: Llama, eot: int) -> dict:
    """Content of config.json: Hugging Face's; with LOST layers also the settings of each, under a model type
    of our own, so that no other program takes the folder for a dense LLaMA."""
    layers = {name: m.settings() for name, m in model.named_modules() if isinstance(m, LOSTLinear)}
    ours, dense = {"model_type": "lost_llama", "lost": layers}, {"architectures": ["LlamaForCausalLM"]}
    return {"dtype": "float32", "model_type": "llama", **model.config.to_hf(), "bos_token_id": eot,
            "eos_token_id": eot, **(ours if layers else dense)}

def optimizer_tensors(model: Llama, optimizers: list) -> dict[str, torch.Tensor]:
    """The optimizers' state as "parameter name.state name", for example model.norm.weight.exp_avg."""
    names = {p: name for name, p in model.named_parameters()}
    return {f"{names[p]}.{key}": value.contiguous()
            for o in optimizers for p, state in o.state.items() for key, value in state.items()}

def load_optimizer(folder: str, model: Llama, optimizers: list):
    """Put the saved state back: the inverse of `optimizer_tensors`."""
    saved: dict[str, dict] = {}
    for name, value in load_tensors(os.path.join(folder, "optimizer.safetensors")).items():
        parameter, _, key = name.rpartition(".")
        saved.setdefault(parameter, {})[key] = value
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if names[p] not in saved:
                raise ValueError(f"{folder} has no optimizer state for {names[p]}: it is another optimizer's")
            optimizer.state[p] = {key: value.to(p.device) for key, value in saved[names[p]].items()}

def load_tensors(path: str) -> dict[str, torch.Tensor]:
    try:                                       # copies: a mapped file keeps its room on the disk if deleted
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as e:
        raise ValueError(f"cannot read {path}: {e}") from None

def checkpoint_folder(path: str) -> str:
    """The folder with a model's files: `path` itself, or the newest good checkpoint of the out_dir `path`."""
    refused = "pickled checkpoints are refused, since loading one can run any code: convert it to safetensors"
    if os.path.isfile(path):
        raise ValueError(f"{path} is a file: give an out_dir or a checkpoint folder ({refused})")
    if glob.glob(os.path.join(glob.escape(path), "*.safetensors")):
        if os.path.exists(os.path.join(path, "state.json")) and (fault := verify(path)):       # ours
            raise ValueError(f"{path} is damaged: {fault}; use an earlier checkpoint")
        return path
    if (folder := newest_checkpoint(path)) is None:
        raise ValueError(f"no checkpoint in {path}: give an out_dir or a checkpoint folder ({refused})")
    return folder

def load_model(path: str) -> tuple[Llama, dict]:
    """Model and state.json (empty for a folder of Hugging Face) from an out_dir or a checkpoint folder, on
    the CPU in float32. Nothing is decomposed. ValueError if anything does not fit."""
    return load_folder(checkpoint_folder(path))

def load_folder(folder: str) -> tuple[Llama, dict]:
    """`load_model` of a checkpoint folder that is known to be good."""
    content = read_json(folder, "config.json")
    with torch.device("meta"):                 # shapes only
        model = Llama(LlamaConfig.from_hf(content))
        for name, settings in content.get("lost", {}).items():
            model.set_submodule(name, LOSTLinear(**settings))
    tensors = {}
    for file in sorted(glob.glob(os.path.join(glob.escape(folder), "model*.safetensors"))):
        tensors |= load_tensors(file)
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()
               if not name.endswith("rotary_emb.inv_freq")}                # in old folders of Hugging Face
    if model.config.tie_embeddings:
        tensors["lm_head.weight"] = tensors.get("model.embed_tokens.weight")
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as e:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {e}") from None
    if model.config.tie_embeddings:            # assigning made two parameters of one
        model.lm_head.weight = model.model["embed_tokens"].weight
    has_state = os.path.exists(os.path.join(folder, "state.json"))
    return model, read_json(folder, "state.json") if has_state else {}
