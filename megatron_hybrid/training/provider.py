"""The provider of data sets that Megatron's training loop calls."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron_hybrid.training.datasets import blends
from megatron_hybrid.training.gpt_dataset import ContentGPTDataset, ContentGPTDatasetConfig
from megatron_hybrid.training.validation import split_config


def datasets(samples: Sequence[int | None], vp_stage: int | None = None, whole: bool = False) -> Any:
    """Train, validation and test sets for the wanted numbers of samples.

    Args:
        samples: Of each of the three.
        vp_stage: The virtual pipeline stage that reads; None without such.
        whole: The validation and test sets are all samples of their data, each once, whatever the weights of a blend.

    Raises:
        NotBuilt: Flags say that the order of documents has been built, and it has not.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args

    args = get_args()
    tokenizer = build_tokenizer(args)
    blend, blend_per_split = blends(args)
    config = ContentGPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        object_storage_cache_path=args.object_storage_cache_path,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=False,  # and no attention mask: documents are told apart in next_batch
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        contents=args.data_contents,
    )
    kind = MockGPTDataset if args.mock_data else ContentGPTDataset

    def build(sizes: Sequence[int | None], config: Any) -> Any:
        return BlendedMegatronDatasetBuilder(kind, sizes, partial(reads_data, vp_stage), config).build()

    if not whole:
        return build(samples, config)
    train, rest = split_config(config)
    return [build([samples[0], 0, 0], train)[0], *build([None, None, None], rest)[1:]]


def reads_data(vp_stage: int | None) -> bool:
    """Whether this rank loads samples: the first rank of each tensor-parallel group, at both pipeline ends.

    With packed documents that is every stage: a stage in the middle takes the boundaries from the tokens.
    """
    from megatron.core import mpu
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    stage_reads = is_first_or_last_pipeline_stage(vp_stage) or get_args().reset_attention_mask
    return stage_reads and mpu.get_tensor_model_parallel_rank() == 0
