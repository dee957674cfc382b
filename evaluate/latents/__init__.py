"""What single latents are: their contexts, logit lens and relations, written as files."""
