//! Statistics kernels.
