//! Statistics of tensor values: what an op call carries beyond its structure.
//!
//! A [`Pattern`] says which statistics a call has and holds everything about them that is not a number
//! (binary or not, why not taken). Patterns repeat, so they are interned; the numbers themselves are
//! columns. The order of a call's numbers is the order of the pattern's entries, and within an entry the
//! order of the fields' bits.

use bincode::{Decode, Encode};

/// Which statistics an op call carries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Encode, Decode)]
pub struct Pattern {
    /// Sorted by (`operand`, `when`).
    pub entries: Vec<PatternEntry>,
}

/// The statistics of one operand of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub struct PatternEntry {
    /// Whose.
    pub operand: Operand,
    /// Before the op ran, or after. Inputs are looked at before, written tensors again after, outputs after.
    pub when: When,
    /// Whether they are there.
    pub state: State,
    /// All elements are 0 or 1 (bool counts, empty counts, NaN does not); `None` where it was not asked.
    pub binary: Option<bool>,
    /// Bits of [`fields`]: the numbers that are there. Empty unless `state` is `Present`.
    pub fields: u32,
}

/// Whose statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum Operand {
    /// Index into `SignatureDef::tensors`.
    Tensor(u16),
    /// The product of the call's two factors (T3, T4), not any tensor.
    Product,
    /// Channels `4 n` to `4 n + 3` of a convolution's input, the first of the call's two factors (T5). Blocks of more channels
    /// stand with their first four.
    Channels(u16),
    /// The call itself, not what it was given or gave.
    Call,
}

/// Channels of the smallest block of [`Operand::Channels`].
pub const CHANNELS_PER_BLOCK: usize = 4;

/// The sizes of crossbar arrays, in input channels, that active patches are counted for, and their fields.
pub const CROSSBARS: [(usize, u32); 6] = [
    (4, fields::ACTIVE_PATCHES_4),
    (16, fields::ACTIVE_PATCHES_16),
    (32, fields::ACTIVE_PATCHES_32),
    (64, fields::ACTIVE_PATCHES_64),
    (128, fields::ACTIVE_PATCHES_128),
    (256, fields::ACTIVE_PATCHES_256),
];

/// When a value was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum When {
    /// Before the op ran.
    Before,
    /// After the op ran.
    After,
}

/// Whether statistics are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum State {
    /// The numbers stand in the call.
    Present,
    /// The numbers will come in a `Statistics` record.
    Pending,
    /// Not taken, and why. Replay treats it as a missing level.
    NotTaken(NotTaken),
    /// Were on their way when the process or device died. Replay treats it as a missing level.
    Lost,
}

/// Why statistics were not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum NotTaken {
    /// The layout has no plain elements: sparse, nested, quantized, mkldnn.
    Layout,
    /// Conjugate, negative or zero bit: the stored bytes are not the values.
    LazyBit,
    /// A Python subclass.
    Subclass,
    /// A device that statistics are not taken on.
    Device,
    /// An element type without statistics (sub-byte, bits, float8).
    DType,
    /// No data: fake, meta, freed storage.
    NoData,
    /// A CUDA graph was being captured.
    Capturing,
    /// All places for a device's answers (or events) were in use, or the call has more operands than a launch takes.
    DeviceFull,
}

/// Bits of [`PatternEntry::fields`]. Integer fields are stored as `u64`, float fields as the bits of an `f64`; bits
/// 0 to 15 are integers, 16 to 31 floats, so that a reader can step over bits that it does not know.
pub mod fields {
    /// T1: nonzero elements. NaN counts, negative zero does not.
    pub const NONZEROS: u32 = 1 << 0;
    /// T2: nonzeros weighted by the number of outputs that each position of a convolution's input feeds.
    pub const FAN_OUT_NONZEROS: u32 = 1 << 1;
    /// T4: sum of the product of two binary factors, exact. Alpha, beta and bias are left out.
    pub const PRODUCT_SUM: u32 = 1 << 2;
    /// T3: rows with a nonzero of a product's factor as it lies in memory: the last two dimensions are a matrix, each matrix of a
    /// batch counts for itself; of `linear`'s input all dimensions but the last are rows. A vector is one row.
    pub const NONEMPTY_ROWS: u32 = 1 << 3;
    /// T3: columns of a product's factor with a nonzero, likewise.
    pub const NONEMPTY_COLUMNS: u32 = 1 << 4;
    /// T3. Of a convolution's input: outputs, counted in all their channels, whose receptive field has a nonzero. Of the
    /// [`Product`](super::Operand::Product) of two binary factors: its elements that are not zero, alpha, beta and bias left out.
    pub const NONEMPTY_OUTPUTS: u32 = 1 << 5;
    /// T5: output positions of a convolution, counted once whatever their channels, whose receptive field in all input channels
    /// has a nonzero.
    pub const ACTIVE_SITES: u32 = 1 << 6;
    /// T5, of a block of four channels: nonzeros, each counted once per output position whose receptive field it is in.
    pub const ACTIVE_ROWS: u32 = 1 << 7;
    /// T5, of a block of 4 channels: output positions whose receptive field in the block has a nonzero.
    pub const ACTIVE_PATCHES_4: u32 = 1 << 8;
    /// The same of the block of 16 channels that begins here; only there where one begins.
    pub const ACTIVE_PATCHES_16: u32 = 1 << 9;
    /// Of 32.
    pub const ACTIVE_PATCHES_32: u32 = 1 << 10;
    /// Of 64.
    pub const ACTIVE_PATCHES_64: u32 = 1 << 11;
    /// Of 128.
    pub const ACTIVE_PATCHES_128: u32 = 1 << 12;
    /// Of 256.
    pub const ACTIVE_PATCHES_256: u32 = 1 << 13;
    /// Of a [`Call`](super::Operand::Call): nanoseconds between two events on the stream of a GPU that the op's work went to, one
    /// before the work and one behind it. What the GPU waited for the work to be launched is in it.
    pub const DEVICE_TIME: u32 = 1 << 14;
    /// T1: sum of the elements, in f64. Of complex tensors the real part.
    pub const SUM: u32 = 1 << 16;
    /// T1: least element. NaN if any is. Absent for empty and complex tensors.
    pub const MINIMUM: u32 = 1 << 17;
    /// T1: greatest element. NaN if any is. Absent for empty and complex tensors.
    pub const MAXIMUM: u32 = 1 << 18;
    /// T2: values weighted as in [`FAN_OUT_NONZEROS`].
    pub const FAN_OUT_SUM: u32 = 1 << 19;

    /// Whether a field is stored as `u64` (else as `f64` bits).
    #[must_use]
    pub const fn is_integer(field: u32) -> bool {
        field < 1 << 16
    }

    /// The fields of a mask, lowest bit first.
    pub fn each(mask: u32) -> impl Iterator<Item = u32> {
        (0..32)
            .map(|bit| 1u32 << bit)
            .filter(move |field| mask & field != 0)
    }
}

impl Pattern {
    /// How many numbers a call with this pattern carries.
    #[must_use]
    pub fn words(&self) -> usize {
        self.entries
            .iter()
            .map(|e| e.fields.count_ones() as usize)
            .sum()
    }

    /// The place of a number among the call's words, if it is there.
    #[must_use]
    pub fn position(&self, operand: Operand, when: When, field: u32) -> Option<usize> {
        let mut at = 0;
        for entry in &self.entries {
            if entry.operand == operand && entry.when == when {
                let below = entry.fields & (field - 1);
                return (entry.fields & field != 0).then_some(at + below.count_ones() as usize);
            }
            at += entry.fields.count_ones() as usize;
        }
        None
    }

    /// The entry of an operand, if it was asked for.
    #[must_use]
    pub fn entry(&self, operand: Operand, when: When) -> Option<&PatternEntry> {
        self.entries
            .iter()
            .find(|e| e.operand == operand && e.when == when)
    }

    /// Whether numbers are still to come.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.entries.iter().any(|e| e.state == State::Pending)
    }
}
