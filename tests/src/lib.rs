//! Whole-system tests: tidy rules, real processes, crash and fault scenarios.
