"""Defines every row of the paper's ablation study (3.3, tables 3 and 10) as a change of
Flamingo-3B.

    python -m launch.train --config=configs/ablations.py:form=vanilla_xattn
    --workdir=runs/vanilla python -m launch.plan --config=configs/ablations.py:form=no_gating
    --counts

The argument is `form,size,root`: the form is one of `ABLATIONS`, by default `baseline`; the
size is `tiny` for a laptop or a machine of `configs/flamingo_3b.py`, as in
`form=mlp,size=tiny`.

All rows have the published batch sizes and 250,000 updates on four datasets, a million
gradients. Where the paper names a row without its sizes, a comment says how they were chosen
to give the published number of parameters. Two published counts differ by a little more than
their rounding,
whatever is chosen: a single block gives 2.06 B instead of 2.0, NFNet-F0 2.85 B instead of 2.9.
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
    """Describes how a row of the tables differs from the baseline.

    changes: {field of the experiment: new value}, nested like the fields. data: names of the
    datasets. p_next: of M3W, the probability that a text attends to the next image instead of
    the previous one.
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
    # Conditioning of the language model.
    "no_gating": _conditioning(gating="none"),
    "vanilla_xattn": _conditioning(kind="vanilla_xattn"),
    # Twelve pairs of a cross-attention block and a decoder layer: 3.26 B, published 3.3.
    "grafting": _conditioning(kind="grafting", grafted_layers=12),
    "single_middle": _conditioning(xattn_first=12, xattn_every=24),
    "every_4th": _conditioning(xattn_every=4),
    "every_2nd": _conditioning(xattn_every=2),
    # The resampler. The MLP has as many parameters as the baseline: those of attention are
    # added to its feed-forward. Small and large have half and twice the layers: 3.12 B and
    # 3.40 B, published 3.1 and 3.4.
    "mlp": _resampler(kind="mlp", feed_forward=10_240),
    "transformer": _resampler(kind="transformer"),
    "small_resampler": _resampler(layers=3),
    "large_resampler": _resampler(layers=12),
    # Images that a text attends to.
    "all_previous": _conditioning(attend_to_media="all_previous"),
    "p_next_0": Ablation(p_next=0.0),
    "p_next_1": Ablation(p_next=1.0),
    # The vision encoder.
    "clip_l14": Ablation(CLIP),
    "nfnet_f0": Ablation(NFNET_F0),
    # Pretraining data of the language model, and which parts are frozen.
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
    """Returns the config of the argument `form,size,root`."""
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
    return to_config(base.with_root(experiment, base.root_of(given["root"], size)))


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
    """Makes the four datasets of the baseline and the ones of single rows."""
    data = base.mixture()
    # Replaces ALIGN and LTIP: as many pairs as both together, with the sum of their weights.
    data["laion"] = dataclasses.replace(
        data["ltip"],
        path=f"{base.DATA}/laion",
        batch_size=data["align"].batch_size + data["ltip"].batch_size,
        weight=data["align"].weight + data["ltip"].weight,
    )
    # Length of rows and weight are published, the batch size is not: 64 rows have about as
    # many tokens as the four other datasets together.
    data["massive_text"] = DatasetConfig(
        "text", f"{base.DATA}/text", batch_size=64, max_length=2048, weight=1.0
    )
    return data


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """Returns a dataclass with changed fields; a mapping changes the nested dataclass of its
    field.
    """
    values = {
        key: _changed(getattr(config, key), value)
        if dataclasses.is_dataclass(getattr(config, key)) and isinstance(value, Mapping)
        else value
        for key, value in changes.items()
    }
    return dataclasses.replace(config, **values)


STANDS_FOR = {"laion": "ltip", "massive_text": "text"}
"""{dataset of a row: dataset of the quickstart that replaces it in the tiny form}."""


def _tiny(experiment: Experiment) -> Experiment:
    """Makes the laptop form, which keeps the row's change."""
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
