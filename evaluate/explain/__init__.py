"""What latents mean, in words, as data: prompts for an explainer and a judge out, answers in, scores. Nobody is asked here."""
