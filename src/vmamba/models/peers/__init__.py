"""Models of the paper's tables that timm does not have, written anew from their papers."""

from vmamba.models.peers import hivit, s4nd, vim  # noqa: F401  (registers the models)
