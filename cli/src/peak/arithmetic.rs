//! Operations per second: fused multiply-adds in registers, in as many independent chains as hide their latency.
//!
//! A fused multiply-add takes four to five cycles and two start in each (agner.org, instruction tables: Zen 2 to 5, Haswell and later), so
//! ten chains keep both units busy. Nothing is loaded or stored in between.

use std::hint::black_box;
use std::time::Duration;

/// Chains: more than latency times units, and no more than there are registers.
const CHAINS: usize = 12;

/// Rounds of one try: some milliseconds.
const ROUNDS: u64 = 1 << 20;

/// Operations per second of so many threads.
pub(super) fn measure(threads: usize, time: Duration, kernel: fn(u64) -> f64) -> f64 {
    super::best(threads, time, |_| kernel(ROUNDS))
}

/// What is multiplied and added: near 1 and near 0, so that no number overflows or becomes denormal.
const FACTOR: f64 = 0.999_999;
const ADDEND: f64 = 1e-6;

macro_rules! kernels {
    ($($name:ident, $portable:ident, $type:ty, $lanes:literal, $avx2:ident, $set:ident, $fma:ident, $avx512:ident,
       $set512:ident, $fma512:ident;)*) => {$(
        /// Runs rounds and returns how many operations they were.
        pub(super) fn $name(rounds: u64) -> f64 {
            #[cfg(target_arch = "x86_64")]
            {
                if std::arch::is_x86_feature_detected!("avx512f") {
                    // SAFETY: the processor has the instructions that the function was compiled for.
                    return unsafe { $avx512(rounds) };
                }
                if std::arch::is_x86_feature_detected!("avx2")
                    && std::arch::is_x86_feature_detected!("fma")
                {
                    // SAFETY: as above.
                    return unsafe { $avx2(rounds) };
                }
            }
            $portable(rounds)
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        fn $avx2(rounds: u64) -> f64 {
            use std::arch::x86_64::{$fma, $set};

            let (factor, addend) = (black_box($set(FACTOR as $type)), black_box($set(ADDEND as $type)));
            let mut chains = [$set(1.0); CHAINS];
            for _ in 0..rounds {
                for chain in &mut chains {
                    *chain = $fma(*chain, factor, addend);
                }
            }
            black_box(chains);
            operations(rounds, $lanes)
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f")]
        fn $avx512(rounds: u64) -> f64 {
            use std::arch::x86_64::{$fma512, $set512};

            let (factor, addend) =
                (black_box($set512(FACTOR as $type)), black_box($set512(ADDEND as $type)));
            let mut chains = [$set512(1.0); CHAINS];
            for _ in 0..rounds {
                for chain in &mut chains {
                    *chain = $fma512(*chain, factor, addend);
                }
            }
            black_box(chains);
            operations(rounds, 2 * $lanes)
        }

        /// For processors without these: what the compiler makes of it.
        fn $portable(rounds: u64) -> f64 {
            let (factor, addend) = (black_box(FACTOR as $type), black_box(ADDEND as $type));
            let mut chains = [[1.0 as $type; $lanes / 2]; CHAINS];
            for _ in 0..rounds {
                for lane in chains.iter_mut().flatten() {
                    // In two steps where one would be a call of a function.
                    *lane = if cfg!(target_arch = "aarch64") {
                        lane.mul_add(factor, addend)
                    } else {
                        *lane * factor + addend
                    };
                }
            }
            black_box(chains);
            operations(rounds, $lanes / 2)
        }
    )*};
}

kernels! {
    float32, portable32, f32, 8, avx2_32, _mm256_set1_ps, _mm256_fmadd_ps, avx512_32, _mm512_set1_ps, _mm512_fmadd_ps;
    float64, portable64, f64, 4, avx2_64, _mm256_set1_pd, _mm256_fmadd_pd, avx512_64, _mm512_set1_pd, _mm512_fmadd_pd;
}

/// A multiply-add is two.
#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn operations(rounds: u64, lanes: usize) -> f64 {
    2.0 * rounds as f64 * (CHAINS * lanes) as f64
}

/// Which instructions are measured.
pub(super) fn instructions() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return "AVX-512 fused multiply-adds";
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
        {
            return "AVX2 fused multiply-adds";
        }
    }
    "multiplications and additions as compiled for this architecture"
}
