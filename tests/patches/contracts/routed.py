"""Upstream code that is relied on for the way of tokens to their experts and back."""

from tests.patches.contract import DISPATCHER, ROUTER, Contract

_UTILS = "core/transformer/moe/moe_utils.py"
_ALL_TO_ALL = "MoEAlltoAllTokenDispatcher"
_C = Contract
CONTRACTS = [
    _C(
        "permute_in_one_pass",
        _UTILS,
        "permute",
        "tokens routing_map probs num_out_tokens fused drop_and_pad tokens_per_expert align_size",
        (
            "routing_map = routing_map.bool().T.contiguous()",
            "flat_sorted = routing_map.reshape(-1).argsort(descending=True, stable=True)\n",
            "flat_sorted = flat_sorted[:num_out_tokens]",
            "return (permuted_input, permuted_probs, sorted_indices, None, tokens_per_expert)",
        ),
    ),
    _C(
        "permute_in_one_pass",
        DISPATCHER,
        f"{_ALL_TO_ALL}.dispatch_preprocess",
        holds=(
            "permuted_probs, self.reversed_local_input_permutation_mapping, _, _ = permute(hidden_states, "
            "self.routing_map, probs=probs, num_out_tokens=self.num_out_tokens, fused=",
        ),
    ),
    _C(
        "unpermute_in_one_pass",
        _UTILS,
        "unpermute",
        "permuted_tokens sorted_indices restore_shape probs routing_map fused drop_and_pad pad_offsets",
        ("output_tokens.scatter_add_(0,", "return output_tokens.to(dtype=input_dtype)"),
    ),
    _C(
        "unpermute_in_one_pass",  # no dispatcher has probabilities applied here
        DISPATCHER,
        holds=(
            "unpermute(permutated_local_input_tokens, self.reversed_local_input_permutation_mapping, "
            "restore_shape=self.hidden_shape_before_permute, routing_map=self.routing_map, fused=",
            "unpermute(hidden_states, self.reversed_local_input_permutation_mapping, "
            "restore_shape=self.hidden_shape_before_permute, routing_map=self.local_map, fused=",
            "unpermute(hidden_states, self.reversed_mapping_for_combine, "
            "restore_shape=self.hidden_shape_before_permute, routing_map=self.dispatched_routing_map, fused=",
        ),
    ),
    _C(
        "leave_sorted_chunks",
        _UTILS,
        "sort_chunks_by_idxs",
        "input split_sizes sorted_idxs probs fused",
        ("output = torch.cat([input[i] for i in sorted_idxs.tolist()], dim=0)", "return (output, permuted_probs)"),
    ),
    _C(
        "leave_sorted_chunks",
        DISPATCHER,
        f"{_ALL_TO_ALL}.__init__",
        holds=(
            "self.permute_idx_device = torch.device('cuda') if self.config.moe_permute_fusion else 'cpu'",
            "self.sort_input_by_local_experts = input_chunk_idxs.reshape(-1, self.num_local_experts).T.ravel()",
        ),
    ),
    _C(
        "keep_counts_on_device",
        DISPATCHER,
        f"{_ALL_TO_ALL}._maybe_dtoh_and_synchronize",
        "self point tokens_per_expert",
        ("if point == self.cuda_dtoh_point:\n", "if point == self.cuda_sync_point:\n", "self.d2h_event.synchronize()"),
    ),
    _C(
        "keep_counts_on_device",
        DISPATCHER,
        f"{_ALL_TO_ALL}.preprocess",
        holds=(
            "self._maybe_update_cuda_sync_point('before_permutation_1')",
            "if self.ep_size > 1 or self.tp_size > 1:\n",
            "self._maybe_update_cuda_sync_point('before_finish')",
            "self.num_out_tokens = routing_map.size(0) * self.config.moe_router_topk",
        ),
    ),
    _C(
        "multiply_in_bf16",
        _UTILS,
        "router_gating_linear",
        "inp weight bias router_dtype",
        ("return RouterGatingLinearFunction.apply(inp, weight, bias, router_dtype)",),
    ),
    _C(
        "multiply_in_bf16",
        ROUTER,
        "Router.gating",
        holds=("logits = router_gating_linear(input, self.weight, self.bias, router_dtype)",),
    ),
    _C(
        "choose_in_one_kernel",
        _UTILS,
        "topk_routing_with_score_function",
        "logits topk use_pre_softmax num_groups group_topk scaling_factor score_function expert_bias fused "
        "router_replay dense_output precomputed_indices",
        (
            "scores_for_routing = scores + expert_bias.float()",
            "probs = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20) if topk > 1 else scores",
            "probs = probs * scaling_factor",
            "routing_probs = torch.zeros_like(logits).scatter(1, top_indices, probs)",
        ),
    ),
    _C(
        "choose_in_one_kernel",
        ROUTER,
        "TopKRouter.routing",
        holds=("probs, routing_map = topk_routing_with_score_function(logits, self.topk, use_pre_softmax=",),
    ),
]
