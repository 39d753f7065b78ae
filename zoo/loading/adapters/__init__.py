"""LoRA adapters: from Mistral's and PEFT's files to what is added to which weights of a model."""
