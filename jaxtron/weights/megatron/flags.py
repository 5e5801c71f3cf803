"""Arguments of Megatron-LM that are no setting of a model: those of which one value is understood, those of training.

By the versions from 2.0 to Core 0.19: what is in neither list, and in no setting, is refused where it is not off.
"""

import re
from typing import Any

# what changes the model, and the values that are understood beside none, false and nothing
ONLY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        "apply_residual_connection_post_layernorm attention_output_gate biencoder_shared_query_context_model "
        "decoder_num_layers enable_mhc_connections experimental_attention_variant "
        "heterogeneous_layers_config_encoded_json heterogeneous_layers_config_path hybrid_layer_pattern "
        "hybrid_override_pattern is_hybrid_model linear_attention_freq moe_apply_probs_on_input "
        "moe_expert_capacity_factor moe_expert_rank_capacity_factor moe_latent_size moe_mlp_glu_interleave_size "
        "moe_router_force_biased moe_router_force_load_balancing moe_shared_expert_glu_interleave_size mrope_section "
        "mtp_hybrid_override_pattern multi_latent_attention no_rope_freq qk_l2_norm retro_add_retriever softmax_scale "
        "spec use_mup use_te_activation_func vision_pretraining".split(),
        (),
    ),
    "hybrid_attention_ratio": (0.0,),
    "hybrid_mlp_ratio": (0.0,),
    "mtp_num_layers": (0,),
    "rope_type": ("rope",),
    "gtp_weight_remat_size": (1,),
    "expert_gtp_weight_remat_size": (1,),
}

# how it was trained, on what, what was written of it, and how it is served
BEGINNINGS = re.compile(
    "_is_|accumulate_|activation_offload|adam_|adlr_|align_|app_tag_|apply_rope_fusion|apply_wd_|async_|auto_detect|"
    "bert_|bias_(dropout|swiglu)_fusion|biencoder_|block_data|check_|checkpoint_|ckpt_|classes_|clip_|config_logger|"
    "consumed_|cpu_offloading|cross_entropy|cuda_graph|data_|dataloader_|ddp_|decoder_(first|last)_pipeline|"
    "decoupled_|defer_|delay_|delta_offload|dino_|disable_(bf16|chunked|jit|msc|straggler|symmetric)|dist_|distrib|dsa_|dump_|dynamic_|embedding_(path|init)|"
    "empty_|enable_(autocast|chunked|cuda|experimental|ft|full|gloo|msc|one_logger)|end_|eod_|ep_overlap|error_injection|eval_|evidence_|exit_|exp_avg|external_|fault_injector|fim_|"
    "fine_grained|finetune|flash_|flight_recorder|fp4|fp8|fp16|fp32|fsdp_|ft_|full_|fused_|global_|gpu_|grad|grpo_|"
    "hierarchical_|high_priority|ict_|img_|indexer_|inference_|init_|initial_|inprocess_|iter|keep_fp8|kitchen|langrl_|lazy_|"
    "linear_(conv|key|value|num)_|lion_|load|local_rank|log|loss_scale|lr|main_|mamba_|manual_|mask_|masked_softmax|"
    "max_(seqlen|tokens)_|megatron_fsdp|memory_|micro|mid_level|min_|mlp_chunks|mmap_|mock_|muon_|mup_|nccl_|no_(async|initialization|load|persist|save|weight_decay)|"
    "non_persistent|null_tokenizer|num_(channels|classes|dataset|distributed|layers_at|layers_per|speculative|"
    "virtual|workers)|object_storage|offload|one_logger|optimizer|outer_dp|overlap_|override_|patch_|per_|perform_|"
    "phase_|pin_|pipeline_|pretrained_|profile|pytorch_|qk_clip|query_in|rampup_|recompute_|record_|refit_|"
    "relative_attention|replication|rerun_|reset_|result_|retriever_|retro_|reuse_|rl_|sample|save|scatter_gather|"
    "scaled_|seed|sgd_|sharp|short_seq|skip|split|start_|step_|straggler|stream_|strict_|suggested_|swin_|symmetric_|"
    "te_|tensorboard_|test_(data|mode)|tiktoken_|timing_|titles_|tokenizer_|torch_|tp_comm|train_|transformer_(impl|pipeline)|"
    "trust_|use_(checkpoint|contiguous|cpu|custom_fsdp|dist|distributed|flash|fused|gloo|grouped|kitchen|layer|"
    "legacy|mamba|mcore|megatron|mp_args|one_sent|persistent|precision|pytorch|ring|sharp|tokenizer|torch|tp_pp|"
    "transformer_engine_op)|valid|variable_|verify_|virtual_|vision_|vocab_(extra|file)|wandb_|weight_decay|wgrad|yarn_"
)
NAMES = frozenset(
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split add_position_embedding "
    "allow_ambiguous_pad_tokens apply_query_key_layer_scaling attention_backend attention_dropout "
    "attention_softmax_in_fp32 barrier_with_L1_time batch_invariant_mode batch_size bf16 bias_gelu_fusion "
    "cache_mla_latents calc_ft_timeouts calculate_per_token_loss chat_template clone_scatter_output_in_embedding "
    "context_parallel_size cp_comm_type create_all_gather_group create_attention_mask_in_dataloader DDP_impl "
    "decode_only_cuda_graphs decoder_seq_length decrease_batch_size_if_needed deprecated_use_mcore_models "
    "deterministic_mode encoder_num_layers encoder_pipeline_model_parallel_size encoder_seq_length "
    "encoder_tensor_model_parallel_size expert_tensor_parallel_num_weight_shards expert_tensor_parallel_size "
    "fake_process_group first_last_layers_bf16 freeze_all_layers ft_num_warmup_iters head_lr_mult hidden_dropout "
    "hybrid_context_parallel hysteresis kv_lora_rank layernorm_epsilon mcore merge_file metadata_path "
    "microbatch_group_size_per_vp_stage min_offloaded_tensor_size mla_down_proj_fusion model_parallel_size "
    "moe_aux_loss_coeff moe_deepep_num_sms moe_enable_deepep moe_enable_routing_replay moe_extended_tp "
    "moe_ffn_hidden_size moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms moe_grouped_gemm "
    "moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms "
    "moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs moe_input_jitter_eps moe_layer_freq "
    "moe_layer_recompute moe_ncclep_static_shape moe_ncclep_zero_copy moe_pad_expert_input_to_capacity "
    "moe_pad_experts_for_cuda_graph_inference moe_paged_stash moe_paged_stash_buffer_size_factor_cpu "
    "moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size moe_per_layer_logging moe_permute_fusion "
    "moe_permute_fusion_into_hybridep moe_router_bias_update_rate moe_router_dtype moe_router_enable_expert_bias "
    "moe_router_fusion moe_router_group_topk moe_router_load_balancing_type moe_router_num_groups "
    "moe_router_padding_for_fp8 moe_router_padding_for_quantization moe_router_pre_softmax "
    "moe_router_quantile_balancing_ema moe_router_score_function moe_router_topk moe_router_topk_limited_devices "
    "moe_router_topk_scaling_factor moe_routing_trace_capture_hidden_states moe_routing_trace_capture_logits "
    "moe_routing_trace_dump_weights moe_routing_trace_max_training_iters moe_routing_trace_path "
    "moe_shared_expert_gate moe_shared_expert_intermediate_size moe_shared_expert_overlap moe_single_grouped_bias "
    "moe_single_grouped_weight moe_token_dispatcher_type moe_token_drop_policy moe_upcycling_granularity "
    "moe_use_legacy_grouped_gemm moe_use_upcycling moe_z_loss_coeff mscale mscale_all_dim mtp_detach_heads "
    "mtp_loss_scaling_factor mtp_standalone mtp_use_repeated_layer multiple_validation_sets nvtx_ranges "
    "offset_sampling_seed_by_dp_rank onnx_safe openai_gelu output_bert_embeddings pad_vocab_size padded_vocab_size "
    "params_dtype persist_layer_norm q_lora_rank qk_head_dim qk_pos_emb_head_dim quick_geglu rank "
    "rotary_scaling_factor run_workload_inspector_server seq_length sequence_parallel sft sft_tokenizer_prompt_format "
    "special_tokens swiglu tensor_parallel_num_weight_shards v_head_dim vocab_size warmup world_size yaml_cfg".split()
)


def is_without_effect(name: str) -> bool:
    """Whether an argument of this name changes nothing of what a trained model computes of a text."""
    return name in NAMES or BEGINNINGS.match(name) is not None
