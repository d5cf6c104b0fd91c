"""Parents and modules on the Hub: upload, model card, pictures."""
