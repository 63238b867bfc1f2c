"""One folder for each family of layers, and the table of all of them.

=================  ====================================================================================
``account``        what a layer states about its costs (``Account``)
``registry``       the table: symbol to account, check, module (``Layer``, ``register``)
``build``          what a layer's spec is built from: the backend's parts, the flags
``norm``           RMSNorm, also over groups of channels that ranks share
``parts``          projections whose rows tensor-parallel ranks share
``attention``      ``*`` and ``W``
``mamba``          ``M``
``intra``          ``P``
``delta``          ``G``
``moe``            ``E``
``ffn``            ``-``
=================  ====================================================================================
"""

from megatron_hybrid.layers.account import Account, NotDeclared
from megatron_hybrid.layers.registry import LAYERS, Layer, register

__all__ = ["LAYERS", "Account", "Layer", "NotDeclared", "register"]
