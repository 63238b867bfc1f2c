"""Upstream code that is relied on for data, tokenizers and flags."""

from tests.patches.contract import MTP, Contract

_C = Contract
CONTRACTS = [
    _C(
        "sample_indices",
        "training/datasets/data_samplers.py",
        "MegatronPretrainingSampler",
        holds=(
            "range(self.consumed_samples, self.total_samples)",
            "start_idx = self.data_parallel_rank * self.micro_batch_size",
            "yield batch[start_idx:end_idx]",
        ),
    ),
    _C(
        "documents",
        "core/datasets/gpt_dataset.py",
        "GPTDataset._query_document_sample_shuffle_indices",
        "self idx",
        ("idx = self.shuffle_index[idx]", "document_ids.append(self.document_index[doc_index_beg])"),
    ),
    _C("documents", "core/datasets/megatron_dataset.py", holds=("self.dataset_path = dataset_path",)),
    _C(
        "blends",
        "training/utils/common_utils.py",
        "get_blend_and_blend_per_split",
        "args",
        ("get_blend_from_list(per_split_data_args['train'])", "get_blend_from_list(args.train_data_path)"),
    ),
    _C(
        "_check_ids",
        "core/tensor_parallel/layers.py",
        "VocabParallelEmbedding.forward",
        holds=("masked_input[input_mask] = 0", "output_parallel[input_mask, :] = 0.0"),
    ),
    _C(
        "ContentGPTDataset",
        "core/datasets/megatron_dataset.py",
        "MegatronDataset.__init__",
        holds=(
            "self.unique_description = json.dumps(self.unique_identifiers, indent=4, default=lambda obj: "
            "obj.unique_identifiers)",
            "hashlib.md5(self.unique_description.encode('utf-8'), usedforsecurity=False)",
        ),
    ),
    _C(
        "ContentGPTDataset",
        "core/datasets/gpt_dataset.py",
        "GPTDataset._build_document_sample_shuffle_indices",
        "self",
        (
            "os.path.join(self.dataset.path_prefix, 'cache', f'{type(self).__name__}_indices')",
            "base = f'{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}'",
            "get_path_to('description.txt')",
            "(not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0)",
        ),
    ),
    _C(
        "ContentGPTDataset",
        "core/datasets/blended_dataset.py",
        "BlendedDataset.__init__",
        holds=("[dataset.unique_identifiers for dataset in self.datasets]",),
    ),
    _C(
        "documents",
        "core/datasets/blended_dataset.py",
        "BlendedDataset.__getitem__",
        holds=("dataset_id = self.dataset_index[idx]", "dataset_sample_id = self.dataset_sample_index[idx]"),
    ),
    _C(
        "next_batch",
        "core/utils.py",
        "get_batch_on_this_tp_rank",
        "batch has_cu_seqlens is_hybrid_cp create_attention_mask_in_dataloader broadcast_src_rank broadcast_group "
        "cp_size tp_rank micro_batch_size seq_length mtp_on_this_rank pipeline_model_parallel_size "
        "is_pipeline_first_stage is_pipeline_last_stage",
    ),
    _C(
        "next_batch",
        "core/utils.py",
        "get_batch_on_this_cp_rank",
        "batch is_hybrid_cp cp_group hybrid_cp_group_func use_per_sequence_balancing",
    ),
    _C(
        "document_ids",
        "core/datasets/gpt_dataset.py",
        "_get_ltor_masks_and_position_ids",
        holds=("position_ids[data == eod_token]", "attention_mask[0, i + 1:, :i + 1] = 0"),
    ),
    _C("next_batch", MTP, "mtp_on_this_rank", "layout mtp_num_layers ignore_virtual vp_stage"),
    _C(
        "parse",
        "training/arguments.py",
        "parse_and_validate_args",
        "extra_args_provider ignore_unknown_args args_defaults",
        (
            "args = parse_args(extra_args_provider, ignore_unknown_args)",
            "validate_args(args, args_defaults)",
            "set_global_variables(args)",
        ),
    ),
    _C(
        "parse",
        "training/arguments.py",
        "parse_args",
        "extra_args_provider ignore_unknown_args",
        ("parser = extra_args_provider(parser)", "args.world_size = int(os.getenv('WORLD_SIZE', '1'))"),
    ),
    _C("add_hybrid_flags", "training/argument_utils.py", "ArgumentGroupFactory", holds=("def build_group(",)),
    _C("add_hybrid_flags", "training/argument_utils.py", "ArgumentGroupFactory.build_group", "self parser title"),
    _C(
        "order_notes",
        "core/datasets/gpt_dataset.py",
        "GPTDataset._build_document_sample_shuffle_indices",
        holds=(
            "threshold = 0.8\n",
            "separate_final_epoch = num_samples_from_final_epoch < int(threshold * num_samples_per_epoch)",
        ),
    ),
    _C(
        "compare",
        "core/tokenizers/text/libraries/huggingface_tokenizer.py",
        "HuggingFaceTokenizer.text_to_ids",
        "self text",
        ("tokens = self.text_to_tokens(text)\n", "ids = self.tokens_to_ids(tokens)\n"),
    ),
    _C(
        "compare",
        "core/tokenizers/text/libraries/huggingface_tokenizer.py",
        "HuggingFaceTokenizer.__init__",
        holds=("special_tokens_dict['sep_token'] = self.tokenizer.eos_token\n", "self.add_special_tokens("),
    ),
    _C(
        "set_connections",
        "training/arguments.py",
        "validate_args",
        holds=("get_device_arch_version() < 10", "os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS') == '1'"),
    ),
]
