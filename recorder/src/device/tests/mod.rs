//! The kernel against the processor's statistics, and the ring over a simulated device.

mod agreement;
mod ring;
