"""Ranks together: process groups, agreement, signs of life, sequences split over context-parallel ranks."""
