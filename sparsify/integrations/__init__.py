"""Integrations: other libraries' training loops on the public hooks of `model.updater`, a few lines each."""
