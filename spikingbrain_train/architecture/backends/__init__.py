"""Who can compute what: one table of backends for each op, for linears and for experts. No torch.

A table says once what each backend needs (a package, a GPU, a release that brings it) and what it cannot
compute. The start-up check reads it before torch is imported, the op call by call, and the models when they
choose the classes of linears and experts.
"""
