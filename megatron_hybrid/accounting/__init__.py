"""The terms in which layers state what they cost. Pure Python: imports neither torch nor Megatron.

===========================  ==========================================================================
``rules``                    divisibility of sizes, in messages for users
``projection``               named rows of a projection, and how tensor-parallel ranks share them
``sizes``                    the sizes of a model, from flags; the sizes of one rank's share of a layer
``layout``                   parallel sizes and the batch, from flags
``refusals``                 settings whose costs are not counted
``activation_settings``      precision, implementation and recomputation, from flags
``storage``                  bytes of a parameter, its gradient and its optimizer state, from flags
``tensors``                  linear layers and parameters
``saved``                    tensors that a forward pass keeps for the backward pass
``traffic``                  what a rank sends, by group of ranks
``cache``                    what a layer keeps of a context in generation
``attention``                FLOPs, saved tensors and messages of softmax attention
``scan``                     the same of the Mamba-2 scan with its convolution
===========================  ==========================================================================
"""
