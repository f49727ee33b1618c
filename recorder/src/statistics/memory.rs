//! The elements of a tensor as plain bytes: the only place of the statistics that follows pointers.
//!
//! A [`View`] is the caller's promise that certain elements are readable. A [`Strided`] is such a promise in a
//! form that can be rearranged: every operation on it (drop, fix, narrow, merge, reorder) leaves the set of
//! elements that it addresses the same or makes it smaller, and its fields are private to this module, so that
//! safe code elsewhere cannot reach outside. Elements are byte arrays: memory that is not aligned
//! (`torch.frombuffer` with an offset) and bools that are neither 0 nor 1 are ordinary values.

use std::marker::PhantomData;

use optape_trace::DType;

/// A strided view of tensor memory.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    first: *const u8,
    dtype: DType,
    sizes: &'a [i64],
    strides: &'a [i64],
}

impl<'a> View<'a> {
    /// A view of the elements `first + sum(index[d] * strides[d])`, strides counted in elements.
    ///
    /// # Safety
    ///
    /// For as long as the view is used, every element that sizes and strides address must be readable,
    /// lie within one allocation, and not be written. A view without elements may have any pointer.
    /// Alignment is not asked for.
    #[must_use]
    pub const unsafe fn new(
        first: *const u8,
        dtype: DType,
        sizes: &'a [i64],
        strides: &'a [i64],
    ) -> Self {
        Self {
            first,
            dtype,
            sizes,
            strides,
        }
    }

    /// The element type.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// The sizes.
    #[must_use]
    pub const fn sizes(&self) -> &'a [i64] {
        self.sizes
    }

    /// The strides, in elements.
    #[must_use]
    pub const fn strides(&self) -> &'a [i64] {
        self.strides
    }

    /// The elements in row-major order, as they stand in memory; `None` where sizes and strides do not make a tensor, elements have no whole bytes,
    /// or there are more than `most_bytes` of these.
    #[must_use]
    pub fn gather(&self, most_bytes: usize) -> Option<Vec<u8>> {
        let element = usize::try_from(self.dtype.bytes())
            .ok()
            .filter(|b| *b > 0)?;
        let count = usize::try_from(self.elements()?).ok()?;
        let total = count.checked_mul(element).filter(|b| *b <= most_bytes)?;
        let mut bytes = Vec::with_capacity(total);
        if count == 0 {
            return Some(bytes);
        }
        // The last dimensions that lie one behind the other are copied in one go.
        let (mut run, mut outer) = (1i64, self.sizes.len());
        while outer > 0 && (self.sizes[outer - 1] == 1 || self.strides[outer - 1] == run) {
            run *= self.sizes[outer - 1];
            outer -= 1;
        }
        let run_bytes = usize::try_from(run).ok()? * element;
        let mut index = vec![0i64; outer];
        loop {
            let offset: i64 = index.iter().zip(self.strides).map(|(i, s)| i * s).sum();
            let offset = isize::try_from(offset).ok()? * isize::try_from(element).ok()?;
            // SAFETY: `index` is inside of the outer sizes and the run inside of the others, so that the promise of `new` covers all elements of
            // the run, which lie one behind the other.
            bytes.extend_from_slice(unsafe {
                std::slice::from_raw_parts(self.first.offset(offset), run_bytes)
            });
            let next = (0..outer).rev().find(|d| index[*d] + 1 < self.sizes[*d]);
            let Some(next) = next else {
                return Some(bytes);
            };
            index[next] += 1;
            index[next + 1..].fill(0);
        }
    }

    /// How many elements there are; `None` where sizes and strides do not make a tensor.
    #[must_use]
    pub fn elements(&self) -> Option<u64> {
        if self.sizes.len() != self.strides.len() {
            return None;
        }
        let mut elements = 1u64;
        let mut empty = false;
        for &size in self.sizes {
            let size = u64::try_from(size).ok()?;
            empty |= size == 0;
            elements = if empty {
                0
            } else {
                elements.checked_mul(size)?
            };
        }
        (elements <= i64::MAX as u64).then_some(elements)
    }

    /// The first element, if there is any.
    pub(super) fn peek<B: Plain>(&self) -> Option<B> {
        if size_of::<B>() as u64 != self.dtype.bytes() || self.elements()? == 0 {
            return None;
        }
        // SAFETY: the view has elements, the caller of `new` promised that they are readable, and the index of
        // all zeros addresses `first`. `B` has alignment 1 and no invalid bytes.
        Some(unsafe { self.first.cast::<B>().read() })
    }

    /// All elements as one slice, where they lie behind each other in order.
    pub(super) fn contiguous<B: Plain>(&self) -> Option<&'a [B]> {
        let mut expected = 1i64;
        for (&size, &stride) in self.sizes.iter().zip(self.strides).rev() {
            if size != 1 {
                if stride != expected {
                    return None;
                }
                expected = expected.checked_mul(size)?;
            }
        }
        let elements = self.elements()?;
        if size_of::<B>() as u64 != self.dtype.bytes() {
            return None;
        }
        if elements == 0 {
            return Some(&[]);
        }
        // SAFETY: strides are those of a dense row-major array, so that the readable elements are exactly the
        // `elements` ones from `first` on. `B` has alignment 1, no invalid bytes and the element's size.
        Some(unsafe { std::slice::from_raw_parts(self.first.cast::<B>(), elements as usize) })
    }
}

mod sealed {
    /// Byte arrays.
    ///
    /// # Safety
    ///
    /// Implemented for types of alignment 1 in which every byte is valid, alone.
    #[expect(unreachable_pub, reason = "sealed: named nowhere else")]
    pub unsafe trait Plain: Copy + 'static {}

    // SAFETY: an array of bytes has alignment 1 and takes any bytes.
    unsafe impl<const N: usize> Plain for [u8; N] {}
}
pub(super) use sealed::Plain;

/// One dimension of a [`Strided`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Dim {
    /// At least 1.
    pub(super) size: usize,
    /// In elements.
    pub(super) stride: isize,
    /// Which dimension of the view this was. After a merge, that of the inner one.
    pub(super) tag: usize,
}

/// A list of dimensions without allocation for all but exotic tensors.
#[derive(Clone, Debug, Default)]
struct Dims {
    inline: [Dim; 8],
    len: usize,
    /// Holds all of them where there are more than eight.
    heap: Vec<Dim>,
}

impl Dims {
    fn push(&mut self, dim: Dim) {
        if self.heap.is_empty()
            && let Some(slot) = self.inline.get_mut(self.len)
        {
            *slot = dim;
        } else {
            if self.heap.is_empty() {
                self.heap.extend_from_slice(&self.inline);
            }
            self.heap.truncate(self.len);
            self.heap.push(dim);
        }
        self.len += 1;
    }

    fn as_slice(&self) -> &[Dim] {
        if self.heap.is_empty() {
            &self.inline[..self.len]
        } else {
            &self.heap[..self.len]
        }
    }

    fn as_mut_slice(&mut self) -> &mut [Dim] {
        if self.heap.is_empty() {
            &mut self.inline[..self.len]
        } else {
            &mut self.heap[..self.len]
        }
    }

    fn remove(&mut self, at: usize) -> Dim {
        let dims = self.as_mut_slice();
        let dim = dims[at];
        dims.copy_within(at + 1.., at);
        self.len -= 1;
        dim
    }
}

/// Elements at regular distances, in any number of dimensions. Never empty: each size is at least 1.
///
/// Invariant: every multi-index within the sizes addresses a readable element of `width` bytes.
#[derive(Clone, Debug)]
pub(super) struct Strided<'a> {
    first: *const u8,
    width: usize,
    dims: Dims,
    lives: PhantomData<&'a [u8]>,
}

impl<'a> Strided<'a> {
    /// The elements of a view; `None` if there are none or sizes and strides do not make a tensor.
    pub(super) fn new(view: &View<'a>) -> Option<Self> {
        if view.elements()? == 0 {
            return None;
        }
        let mut dims = Dims::default();
        for (tag, (&size, &stride)) in view.sizes.iter().zip(view.strides).enumerate() {
            dims.push(Dim {
                size: usize::try_from(size).ok()?,
                stride: isize::try_from(stride).ok()?,
                tag,
            });
        }
        let width = usize::try_from(view.dtype.bytes()).ok()?;
        Some(Self {
            first: view.first,
            width,
            dims,
            lives: PhantomData,
        })
    }

    /// The dimensions, outermost first.
    pub(super) fn dims(&self) -> &[Dim] {
        self.dims.as_slice()
    }

    /// Drops the dimensions that satisfy `which`, keeping their index 0, after showing each.
    pub(super) fn drop_dims(&mut self, mut which: impl FnMut(Dim) -> bool) {
        let mut at = 0;
        while at < self.dims.len {
            if which(self.dims.as_slice()[at]) {
                self.dims.remove(at);
            } else {
                at += 1;
            }
        }
    }

    /// Drops dimensions of size 1 and those that repeat the same elements (stride 0); gives the number of repetitions.
    pub(super) fn drop_repeated(&mut self) -> u64 {
        let mut repeated = 1u64;
        self.drop_dims(|dim| {
            let drop = dim.size == 1 || dim.stride == 0;
            if drop {
                // Cannot overflow: the element count of the view fits.
                repeated *= dim.size as u64;
            }
            drop
        });
        repeated
    }

    /// Replaces the dimension of a tag by one of its indices. Without that dimension, or beyond its end: nothing.
    pub(super) fn fix(&mut self, tag: usize, index: usize) {
        if let Some(at) = self
            .dims()
            .iter()
            .position(|d| d.tag == tag && index < d.size)
        {
            let dim = self.dims.remove(at);
            self.first = self.address(index as isize * dim.stride);
        }
    }

    /// Keeps the indices `start..start + len` of the dimension of a tag, as far as they exist and are any.
    pub(super) fn narrow(&mut self, tag: usize, start: usize, len: usize) {
        let Some(at) = self
            .dims()
            .iter()
            .position(|d| d.tag == tag && start < d.size)
        else {
            return;
        };
        let dim = &mut self.dims.as_mut_slice()[at];
        let stride = dim.stride;
        dim.size = (dim.size - start).min(len.max(1));
        self.first = self.address(start as isize * stride);
    }

    /// Orders the dimensions by distance, the nearest elements innermost.
    pub(super) fn sort(&mut self) {
        // Insertion sort: a handful of dimensions, almost always in order already.
        let dims = self.dims.as_mut_slice();
        for i in 1..dims.len() {
            let mut j = i;
            while j > 0 && dims[j - 1].stride.unsigned_abs() < dims[j].stride.unsigned_abs() {
                dims.swap(j - 1, j);
                j -= 1;
            }
        }
    }

    /// Makes one dimension of two neighbours wherever they walk the memory like one and `may(outer, inner)`.
    pub(super) fn merge(&mut self, mut may: impl FnMut(Dim, Dim) -> bool) {
        let mut at = self.dims.len;
        while at >= 2 {
            at -= 1;
            let dims = self.dims.as_mut_slice();
            let (outer, inner) = (dims[at - 1], dims[at]);
            if walks_on(outer, inner) && may(outer, inner) {
                dims[at - 1] = Dim {
                    size: outer.size * inner.size,
                    stride: inner.stride,
                    tag: inner.tag,
                };
                self.dims.remove(at);
            }
        }
    }

    /// Visits all elements as runs along the innermost dimension. `visit` gets the indices of the dimensions
    /// outside of it, and says whether to go on.
    pub(super) fn runs<B: Plain>(&self, mut visit: impl FnMut(&[usize], Run<'a, B>) -> bool) {
        if size_of::<B>() != self.width {
            return;
        }
        let (outer, inner) = match self.dims() {
            [] => (
                &[][..],
                Dim {
                    size: 1,
                    stride: 1,
                    tag: 0,
                },
            ),
            [outer @ .., inner] => (outer, *inner),
        };
        let mut inline = [0usize; 8];
        let mut heap = Vec::new();
        let indices = if outer.len() <= inline.len() {
            &mut inline[..outer.len()]
        } else {
            heap.resize(outer.len(), 0);
            &mut heap[..]
        };
        let mut offset = 0isize;
        loop {
            // The run keeps the invariant: its elements are those with `indices` outside and any index inside.
            let first = self.address(offset).cast::<B>();
            let run = Run {
                first,
                count: inner.size,
                stride: inner.stride,
                lives: PhantomData,
            };
            if !visit(indices, run) {
                return;
            }
            let mut level = outer.len();
            loop {
                if level == 0 {
                    return;
                }
                level -= 1;
                indices[level] += 1;
                offset += outer[level].stride;
                if indices[level] < outer[level].size {
                    break;
                }
                offset -= outer[level].stride * outer[level].size as isize;
                indices[level] = 0;
            }
        }
    }

    /// The address of the element `offset` elements away from the first. Whether it may be read is the caller's matter.
    fn address(&self, offset: isize) -> *const u8 {
        self.first
            .wrapping_offset(offset.wrapping_mul(self.width as isize))
    }
}

/// Whether stepping `outer` once is stepping `inner` to its end.
pub(super) fn walks_on(outer: Dim, inner: Dim) -> bool {
    isize::try_from(inner.size)
        .ok()
        .and_then(|size| size.checked_mul(inner.stride))
        == Some(outer.stride)
}

/// Elements at one regular distance.
///
/// Invariant: `first + i * stride` is readable for every `i < count`.
#[derive(Clone, Copy)]
pub(super) struct Run<'a, B> {
    first: *const B,
    count: usize,
    stride: isize,
    lives: PhantomData<&'a B>,
}

impl<'a, B: Plain> Run<'a, B> {
    /// How many elements.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// The elements, where they lie behind each other.
    pub(super) fn slice(&self) -> Option<&'a [B]> {
        (self.stride == 1 || self.count == 1).then(|| {
            // SAFETY: by the invariant, and as the stride is 1 or does not matter, `count` elements from `first`
            // on are readable for `'a`; `B` has alignment 1 and no invalid bytes.
            unsafe { std::slice::from_raw_parts(self.first, self.count) }
        })
    }

    /// Copies elements from `start` on behind those in the buffer, until it holds `limit`; gives how many.
    pub(super) fn append(&self, start: usize, buffer: &mut Vec<B>, limit: usize) -> usize {
        let count = self
            .count
            .saturating_sub(start)
            .min(limit.saturating_sub(buffer.len()));
        buffer.extend((start..start + count).map(|at| {
            // SAFETY: `at` is less than `self.count`.
            unsafe { self.first.offset(at as isize * self.stride).read() }
        }));
        count
    }
}
