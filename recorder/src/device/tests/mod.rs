//! The kernel against the processor's statistics, the ring and the times of calls over a simulated device.

mod agreement;
mod driver;
mod ring;
mod timing;
