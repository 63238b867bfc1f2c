"""What the intra-layer hybrid needs of flags and layout."""

from argparse import Namespace

from megatron_hybrid.accounting.divisibility import check_divides, check_shares
from megatron_hybrid.argv import flag_name
from megatron_hybrid.layers.attention.check import check_window_dropout
from megatron_hybrid.layers.intra.design import design
from megatron_hybrid.layers.mamba.check import check_initial_decay, check_memory_efficient_path, check_scan


def check(args: Namespace) -> None:
    """The branches of ``P`` against the layout; ``design`` checks them against each other.

    Raises:
        ValueError: With the values, the rule and the remedy.
    """
    if args.intra_window is not None:
        check_window_dropout(args)
    check_initial_decay(args)
    d, tp = design(args), args.tensor_model_parallel_size
    if "attention" in d.branches:
        check_divides(d.num_attention_heads, "--intra-num-attention-heads", tp, "--tensor-model-parallel-size")
        check_shares(d.num_query_groups, "--intra-num-query-groups", tp)
        if int(d.qk_head_dim * args.rotary_percent) % 2 and args.position_embedding_type == "rope":
            raise ValueError(
                f"--intra-qk-dim gives heads of {d.qk_head_dim} channels, of which --rotary-percent "
                f"{args.rotary_percent} turns an odd number: RoPE needs an even one."
            )
    if "mamba" in d.branches:
        what = f"the heads of P layers (--intra-ssm-dim {d.ssm_dim} / --intra-ssm-head-dim {d.ssm_head_dim})"
        check_scan(args, d.ssm_heads, what)
        check_memory_efficient_path(args, True)
    if d.norm_groups and d.norm != "none":
        check_shares(d.norm_groups, "--intra-norm-groups", tp)
    for name, remedy in (
        ("add_bias_linear", "add --disable-bias-linear"),
        ("add_qkv_bias", "drop --add-qkv-bias"),
        ("attention_output_gate", "drop --attention-output-gate"),
    ):
        if getattr(args, name):
            raise ValueError(f"P layers have no biases and no output gate, and {flag_name(name)} is on: {remedy}.")
    if args.use_mup:
        raise ValueError(
            "--use-mup cannot be combined with P layers: their heads have another size, and their scores would be "
            "scaled like those of * layers. Drop it."
        )
