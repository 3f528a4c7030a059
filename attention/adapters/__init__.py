"""Other libraries' attention modules, a file a library: found in a model, and changed in place.

Every file has a function ``modules(model)``, which gives the attention modules that it knows by
name, and ``change(model, found, wanted)``, which changes them. A file is imported where its library
has been: a model of timm's can't be there without timm.
"""
