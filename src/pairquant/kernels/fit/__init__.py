"""Kernels that fit transforms and round weights."""
