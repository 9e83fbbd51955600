"""Every row of the paper's ablation study (3.3, tables 3 and 10), as a change of Flamingo-3B.

    python -m launch.train --config=configs/ablations.py:form=vanilla_xattn --workdir=runs/vanilla
    python -m launch.plan --config=configs/ablations.py:form=no_gating --counts

The argument is `form,size,root`: the form is one of `ABLATIONS`, by default `baseline`; the size
is `tiny` for a laptop or a machine of `configs/flamingo_3b.py`, as in `form=mlp,size=tiny`.

All rows have the published batches and 250,000 updates of four datasets, a million gradients.
Where the paper names a row without its sizes, they are chosen so that its parameters are as many
as published, and a comment says so. Two published counts are off by a little more than their
rounding whatever is chosen: one block alone makes 2.06 B and not 2.0, NFNet-F0 2.85 B and not
2.9.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from configs import base
from configs.flamingo_3b import MACHINES
from flamingo_jax.configuring import did_you_mean, to_config
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import DatasetConfig, Experiment, VisionConfig, ViTConfig

M3W, PAIRS, VTP = ("m3w",), ("align", "ltip"), ("vtp",)


class Ablation(NamedTuple):
    """What a row of the tables changes of the baseline.

    changes: new values of the experiment's fields, nested as they are. data: what is trained on.
    p_next: of M3W.
    """

    changes: Mapping[str, Any] = types.MappingProxyType({})
    data: tuple[str, ...] = (*M3W, *PAIRS, *VTP)
    p_next: float = 0.5


def _conditioning(**changes: Any) -> Ablation:
    return Ablation({"flamingo": {"conditioning": changes}})


def _resampler(**changes: Any) -> Ablation:
    return Ablation({"flamingo": {"resampler": changes}})


def _training(**changes: Any) -> Ablation:
    return Ablation({"training": changes})


RANDOM_ENCODER = {"training": {"unfreeze_vision_encoder": True}, "vision_encoder_from": "random"}
RANDOM_LM = {"training": {"unfreeze_language_model": True}, "language_model_from": "random"}
CLIP = {
    "flamingo": {
        "vision": VisionConfig(
            image_size=224,
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
            image_fit="crop",
            vit=ViTConfig(),
        )
    },
    "vision_encoder_from": "models/clip-vit-large-patch14",
}
# Trained as configs/contrastive_nfnet_f6.py with --config.contrastive.vision.variant=F0.
NFNET_F0 = {
    "flamingo": {"vision": VisionConfig("F0", image_size=320)},
    "vision_encoder_from": f"{base.EXPORTS}/contrastive_nfnet_f0",
}

ABLATIONS: dict[str, Ablation] = {
    "baseline": Ablation(),
    # Training data.
    "m3w_only": Ablation(data=M3W),
    "no_vtp": Ablation(data=(*M3W, *PAIRS)),
    "no_pairs": Ablation(data=(*M3W, *VTP)),
    "laion_pairs": Ablation(data=(*M3W, "laion", *VTP)),
    "no_m3w": Ablation(data=(*PAIRS, *VTP)),
    # Optimisation.
    "round_robin": _training(round_robin=True),
    # How the language model is conditioned.
    "no_gating": _conditioning(gating="none"),
    "vanilla_xattn": _conditioning(kind="vanilla_xattn"),
    # Twelve pairs of a cross-attention block and a decoder layer: 3.26 B, published 3.3.
    "grafting": _conditioning(kind="grafting", grafted_layers=12),
    "single_middle": _conditioning(xattn_first=12, xattn_every=24),
    "every_4th": _conditioning(xattn_every=4),
    "every_2nd": _conditioning(xattn_every=2),
    # The resampler. The MLP has the baseline's parameters, those of attention in its
    # feed-forward; small and large are half as deep and twice as deep: 3.12 B and 3.40 B,
    # published 3.1 and 3.4.
    "mlp": _resampler(kind="mlp", feed_forward=10_240),
    "transformer": _resampler(kind="transformer"),
    "small_resampler": _resampler(layers=3),
    "large_resampler": _resampler(layers=12),
    # Which images a text sees.
    "all_previous": _conditioning(attend_to_media="all_previous"),
    "p_next_0": Ablation(p_next=0.0),
    "p_next_1": Ablation(p_next=1.0),
    # The vision encoder.
    "clip_l14": Ablation(CLIP),
    "nfnet_f0": Ablation(NFNET_F0),
    # The language model's own data, and what is frozen.
    "lm_c4": Ablation({"language_model_from": f"{base.EXPORTS}/lm_1b4_c4"}),
    "vision_scratch": Ablation(RANDOM_ENCODER),
    "vision_finetuned": _training(unfreeze_vision_encoder=True),
    "lm_scratch": Ablation(RANDOM_LM),
    "lm_finetuned": _training(unfreeze_language_model=True),
    "lm_scratch_cotrained": Ablation(RANDOM_LM, (*M3W, *PAIRS, *VTP, "massive_text")),
    "lm_finetuned_cotrained": Ablation(
        {
            "training": {"unfreeze_language_model": True},
            "optimizer": {"learning_rate_scales": {"language_model": 0.1}},
        },
        (*M3W, *PAIRS, *VTP, "massive_text"),
    ),
    # Public data and a public encoder.
    "laion_only": Ablation(CLIP, ("laion",)),
    "laion_m3w_vtp": Ablation(CLIP, (*M3W, "laion", *VTP)),
}
"""The rows of tables 3 and 10 by name."""


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of `form,size,root`."""
    given = base.arguments(arg, "ablations", ("form", "size", "root"))
    form, size = given["form"] or "baseline", given["size"]
    if form not in ABLATIONS:
        close = did_you_mean(form, ABLATIONS) or f": choose one of {', '.join(ABLATIONS)}"
        raise UserError(f"configs/ablations.py has no form {form!r}{close}")
    if size not in ("", base.TINY, *MACHINES):
        sizes = ", ".join((base.TINY, *MACHINES))
        raise UserError(f"configs/ablations.py has no size {size!r}: choose one of {sizes}")
    experiment = _experiment(form)
    if size == base.TINY:
        experiment = _tiny(experiment)
    else:
        experiment = base.on_machine(experiment, size, "ablations", MACHINES)
    return to_config(base.rooted(experiment, base.root_of(given["root"], size)))


def _experiment(form: str) -> Experiment:
    ablation, datasets = ABLATIONS[form], _datasets()
    datasets["m3w"] = dataclasses.replace(datasets["m3w"], p_next=ablation.p_next)
    baseline = base.flamingo(
        f"flamingo 3B, {form.replace('_', ' ')}",
        base.LM_1B4,
        every=1,
        lm_export="lm_1b4",
        data={name: datasets[name] for name in ablation.data},
    )
    return _changed(_changed(baseline, {"training": {"steps": 250_000}}), ablation.changes)


def _datasets() -> dict[str, DatasetConfig]:
    """The baseline's four, and those of single rows."""
    data = base.mixture()
    # In the place of ALIGN and LTIP: as many pairs as both, whose mean weighs what their two
    # means did.
    data["laion"] = dataclasses.replace(
        data["ltip"],
        path=f"{base.DATA}/laion",
        batch_size=data["align"].batch_size + data["ltip"].batch_size,
        weight=data["align"].weight + data["ltip"].weight,
    )
    # Rows and weight as published; how many rows is not: about as many tokens as the four
    # others have together.
    data["massive_text"] = DatasetConfig(
        "text", f"{base.DATA}/text", batch_size=64, max_length=2048, weight=1.0
    )
    return data


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A dataclass with other values; a mapping changes the dataclass in its place."""
    values = {
        key: _changed(getattr(config, key), value)
        if dataclasses.is_dataclass(getattr(config, key)) and isinstance(value, Mapping)
        else value
        for key, value in changes.items()
    }
    return dataclasses.replace(config, **values)


STANDS_FOR = {"laion": "ltip", "massive_text": "text"}
"""A row's dataset -> the one that the quickstart's world has in its place."""


def _tiny(experiment: Experiment) -> Experiment:
    """The laptop's form, which keeps what the row changes."""
    small = base.tiny(experiment)
    assert small.flamingo is not None
    conditioning = {"grafted_layers": 2}
    changes: dict[str, Any] = {"conditioning": conditioning}
    if small.flamingo.conditioning.xattn_first:
        # One block before the second of two layers.
        conditioning |= {"xattn_first": 1, "xattn_every": 2}
        changes["language_model"] = {"layers": 2}
    data = {
        name: dataclasses.replace(d, path=f"{base.DATA}/{STANDS_FOR.get(name, name)}")
        for name, d in small.data.items()
    }
    return _changed(small, {"flamingo": changes, "data": data, "held_out": base.held_out(data)})
