"""Pictures as callers give them: opened, counted in tokens, and prepared for an encoder."""
