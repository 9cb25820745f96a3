"""The doctor: looks at a machine and a store, and judges them by the practices that hospitals are told to follow.

What looks (``blocks``, ``running``, ``machine``, ``store``, ``asked``, ``probe``) gathers plain facts and never raises;
what judges (``judge`` with the tables that it joins, ``exposure``) is pure and takes the time with the facts.
"""
