"""What stands in for packages that are not installed."""

from typing import Any


def mamba_names() -> dict[str, Any]:
    """Whether upstream's mixer has our kernels, and the error when a name is gone."""
    import torch
    from megatron.core.ssm import mamba_mixer

    from megatron_hybrid.kernels import ssm_kernels
    from megatron_hybrid.patches import missing_packages
    from megatron_hybrid.patches.patching import install, uninstall

    ours = ssm_kernels("cpu", "torch")
    kernels = missing_packages.mamba_kernels(ours)
    uninstall(kernels.name)
    kept, upstreams = mamba_mixer.MAMBA_HAS_STATE_DTYPE, dict(vars(mamba_mixer))
    del mamba_mixer.MAMBA_HAS_STATE_DTYPE
    try:
        install(kernels)
        error = "none"
    except RuntimeError as e:
        error = str(e)
    mamba_mixer.MAMBA_HAS_STATE_DTYPE = kept
    untouched = all(vars(mamba_mixer)[row.name] is upstreams[row.name] for row in kernels.rows)
    install(kernels)
    return {
        "combined": mamba_mixer.mamba_split_conv1d_scan_combined is ours.split_conv1d_scan,
        "scan": mamba_mixer.mamba_chunk_scan_combined is ours.chunk_scan,
        "conv": mamba_mixer.causal_conv1d_fn is ours.causal_conv1d,
        "norm": issubclass(mamba_mixer.ExtendedRMSNorm, torch.nn.Module),
        "untouched by the failure": untouched,
        "error": error,
    }


def test_the_mixer_has_our_kernels_and_a_lost_name_is_an_error(ranks):
    found = ranks(1).run(mamba_names)[0]
    assert found.pop("error") == "megatron.core.ssm.mamba_mixer has no MAMBA_HAS_STATE_DTYPE: it has changed upstream"
    assert found == dict.fromkeys(found, True)
