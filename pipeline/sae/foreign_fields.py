"""Names in the configs of other trainers: which are read, which say only how something was trained or stored. All others are
refused by name, since nobody here knows whether they change what an SAE computes."""

from __future__ import annotations

SAELENS_ACTIVATIONS = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "jumprelu",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
}
"""The last two are a trainer's own checkpoints; what SAELens saves for inference is a jumprelu without its levels."""
SAELENS_TRANSCODERS = {
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
SAELENS_TENSORS = {
    "gated": "W_enc W_dec b_gate b_mag r_mag b_dec",
    "jumprelu": "W_enc W_dec b_enc b_dec threshold",
    "batchtopk": "W_enc W_dec b_enc b_dec topk_threshold",
    "matryoshka_batchtopk": "W_enc W_dec b_enc b_dec topk_threshold",
}
SAELENS_NEUTRAL = {
    "normalize_activations": ("none", False, None),
    "reshape_activations": ("none",),
    "rescale_acts_by_decoder_norm": (False, True),
    "finetuning_scaling_factor": (False, None),
    "hook_head_index": (None,),
}
"""Fields that change what is computed, with the values that change nothing (or that `from_saelens` reads)."""
SAELENS_FIELDS = (
    "architecture activation_fn activation_fn_str activation_fn_kwargs apply_b_dec_to_input d_in d_out d_sae hook_layer "
    "hook_name k matryoshka_widths metadata model_name "
    "aux_loss_coefficient context_size dataset_path dataset_trust_remote_code decoder_init_norm device dtype "
    "from_pretrained_path l1_coefficient lp_norm model_class_name model_from_pretrained_kwargs neuronpedia_id noise_std "
    "prepend_bos sae_lens_training_version sae_lens_version seqpos_slice topk_threshold_lr use_matryoshka_aux_loss "
    "use_sparse_activations"
)
"""First those that are read, then those that say how it was trained or stored."""
MODEL_HARMLESS = (
    "fold_ln fold_value_biases center_unembed refactor_factored_attn_matrices default_prepend_bos default_padding_side "
    "device device_map n_devices move_to_device dtype torch_dtype attn_implementation low_cpu_mem_usage first_n_layers "
    "trust_remote_code local_files_only cache_dir token use_fast"
)
"""Options for loading a model that leave the rows of its stream as they are, but for rounding."""
DICTIONARY_ACTIVATIONS = {
    "AutoEncoder": "relu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
    "JumpReluAutoEncoder": "jumprelu",
    "GatedAutoEncoder": "jumprelu",
}
DICTIONARY_STYLES = (
    "encoder.weight encoder.bias decoder.weight bias",
    "encoder.weight encoder.bias decoder.weight b_dec",
    "W_enc b_enc W_dec b_dec",
)
"""What the tensors that all but the gated have are called."""
DICTIONARY_GATED = "encoder.weight decoder.weight decoder_bias r_mag gate_bias mag_bias"
DICTIONARY_EXTRAS = {
    "AutoEncoder": ("", ""),
    "AutoEncoderTopK": ("", "k threshold"),
    "BatchTopKSAE": ("threshold", "k"),
    "MatryoshkaBatchTopKSAE": ("threshold group_sizes", "k"),
    "JumpReluAutoEncoder": ("threshold", ""),
}
"""What a class has beside them, and what it may have."""
DICTIONARY_FIELDS = (
    "dict_class activation_dim dict_size k layer lm_name submodule_name "
    "trainer_class lr steps seed device wandb_name warmup_steps decay_start auxk_alpha threshold_beta "
    "threshold_start_step top_k_aux group_fractions group_weights group_sizes l1_penalty resample_steps "
    "sparsity_warmup_steps sparsity_function sparsity_penalty p_start p_end anneal_start sparsity_queue_length "
    "n_sparsity_updates bandwidth target_l0 norm_factor k_anneal_steps log_steps"
)
"""Of its trainers: first those that are read. A `norm_factor` is in the biases already, as they are saved."""
MATRYOSHKA_ACTIVATIONS = {
    "vanilla": "relu",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "global-matryoshka-topk": "batchtopk",
}
MATRYOSHKA_NEUTRAL = {"activation": ("relu", None), "tied_weights": (False, None)}
MATRYOSHKA_FIELDS = (
    "sae_type input_unit_norm act_size dict_size group_sizes top_k hook_point layer site model_name "
    "seed batch_size lr num_tokens l1_coeff l1_warmup_frac beta1 beta2 max_grad_norm seq_len dtype sae_dtype model_dtype "
    "device model_batch_size num_batches_in_buffer dataset_path wandb_project perf_log_freq checkpoint_freq "
    "checkpoint_dir name top_k_aux aux_penalty n_batches_to_dead bandwidth pool_size softmax_aux_penalty quantile "
    "quantile_lr max_seq_len"
)
"""First those that are read."""
SPARSIFY_NEUTRAL = {"activation": ("topk",)}
SPARSIFY_FIELDS = "k d_in num_latents expansion_factor normalize_decoder multi_topk skip_connection transcode"
GEMMA_SCOPE_2_FIELDS = "architecture model_name hf_hook_point_in hf_hook_point_out width l0 affine_connection type"
OPENAI_SETTINGS = "activation activation_state_dict"
