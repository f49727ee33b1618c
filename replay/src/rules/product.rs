//! Products of two factors: what a multiply-accumulate, an accumulate and a synaptic operation is made of.
//!
//! In a matrix product every element of a factor is used equally often, `products / elements(factor)` times. In a
//! convolution the borders make a difference, and the trace holds the fan-out of the nonzeros.

use super::{CallRow, Need, RuleError, TensorView};

/// How often the factors of a product meet.
pub(crate) struct Geometry<'a> {
    /// First factor and its name.
    pub(crate) left: (&'static str, TensorView<'a>),
    /// Second factor and its name.
    pub(crate) right: (&'static str, TensorView<'a>),
    /// Multiplications of one call, borders not taken off.
    pub(crate) products: i128,
    /// A convolution.
    pub(crate) convolution: bool,
}

/// Names of the factors of an op, and how they are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// `[m, k] x [k, n]`.
    Matrix(&'static str, &'static str),
    /// `[b, m, k] x [b, k, n]`.
    Batched(&'static str, &'static str),
    /// `x @ weight^T`.
    Linear,
    /// `torch.matmul`, and products with vectors.
    Broadcast(&'static str, &'static str),
    /// Arguments named as `aten::convolution` names them; `true`: the op is a transposed one by its name.
    Convolution(Option<bool>),
}

impl Form {
    pub(crate) const fn factors(self) -> (&'static str, &'static str) {
        match self {
            Self::Matrix(a, b) | Self::Batched(a, b) | Self::Broadcast(a, b) => (a, b),
            Self::Linear | Self::Convolution(_) => ("input", "weight"),
        }
    }

    /// What the spike rules of such a product read.
    pub(crate) fn needs(self) -> Vec<Need> {
        let (a, b) = self.factors();
        let mut needs = vec![
            Need::Spikes(a, false),
            Need::Spikes(b, false),
            Need::Product,
        ];
        if matches!(self, Self::Convolution(_)) {
            needs.push(Need::FanOut(a));
        }
        needs
    }

    /// The formula of the number of products.
    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::Matrix(..) => "m * n * k",
            Self::Batched(..) => "b * m * n * k",
            Self::Linear => "elements(input) * out_features",
            Self::Broadcast(..) => "elements(out) * k",
            Self::Convolution(_) => "positions * weight.size(1) * kernel",
        }
    }

    pub(crate) fn geometry<'a>(self, row: &CallRow<'a>) -> Result<Geometry<'a>, RuleError> {
        let (a, b) = self.factors();
        let (x, y) = (row.tensor(a)?, row.tensor(b)?);
        let products = match self {
            Self::Matrix(..) => {
                let (m, k, n) = (
                    row.note("m", x.size(0)?),
                    row.note("k", x.size(1)?),
                    row.note("n", y.size(1)?),
                );
                same(k, y.size(0)?)?;
                m * n * k
            }
            Self::Batched(..) => {
                let (batch, m) = (row.note("b", x.size(0)?), row.note("m", x.size(1)?));
                let (k, n) = (row.note("k", x.size(2)?), row.note("n", y.size(2)?));
                same(batch, y.size(0)?)?;
                same(k, y.size(1)?)?;
                batch * m * n * k
            }
            Self::Linear => {
                let features = if y.dimensions() == 1 { 1 } else { y.size(0)? };
                row.note("elements(input)", x.elements()) * row.note("out_features", features)
            }
            Self::Broadcast(..) => {
                let out = row.output(0)?;
                row.note("elements(out)", out.elements()) * row.note("k", x.size(-1)?)
            }
            Self::Convolution(by_name) => convolution_products(row, by_name)?,
        };
        Ok(Geometry {
            left: (a, x),
            right: (b, y),
            products,
            convolution: matches!(self, Self::Convolution(_)),
        })
    }
}

/// Whether a convolution is a transposed one.
pub(crate) fn is_transposed(row: &CallRow<'_>, by_name: Option<bool>) -> Result<bool, RuleError> {
    by_name.map_or_else(|| row.boolean("transposed"), Ok)
}

/// Multiplications of a convolution: every output position (input position of a transposed one) with the whole kernel.
/// `weight.size(1)` is already divided by the groups.
fn convolution_products(row: &CallRow<'_>, by_name: Option<bool>) -> Result<i128, RuleError> {
    let (input, weight, out) = (row.tensor("input")?, row.tensor("weight")?, row.output(0)?);
    let positions = if is_transposed(row, by_name)? {
        input
    } else {
        out
    };
    let positions = row.note("positions", positions.elements());
    Ok(positions
        * row.note("weight.size(1)", weight.size(1)?)
        * row.note("kernel", weight.elements_from(2)))
}

fn same(a: i128, b: i128) -> Result<(), RuleError> {
    if a == b {
        Ok(())
    } else {
        Err(RuleError::Unsuited(format!(
            "the inner sizes {a} and {b} of the product differ"
        )))
    }
}

impl Geometry<'_> {
    /// Multiply-accumulates: all products, or none where a factor is binary (then they are accumulates).
    pub(crate) fn macs(&self, row: &CallRow<'_>) -> Result<i128, RuleError> {
        let spikes = row.binary(self.left.0, row.seen_after(self.left.0))?
            || row.binary(self.right.0, row.seen_after(self.right.0))?;
        if spikes {
            Ok(0)
        } else {
            times(self.products, i128::from(row.calls))
        }
    }

    /// Accumulates that spikes cause, over all calls of the row: each nonzero of a binary factor adds the elements of the
    /// other factor that it meets; where both are binary, only those that are nonzero too.
    pub(crate) fn accumulates(&self, row: &CallRow<'_>) -> Result<i128, RuleError> {
        let left = row.binary(self.left.0, row.seen_after(self.left.0))?;
        let right = row.binary(self.right.0, row.seen_after(self.right.0))?;
        match (left, right) {
            (true, true) => row.product_sum(),
            (true, false) if self.convolution => row.fan_out_nonzeros(self.left.0),
            (true, false) => self.uses(row, self.left),
            (false, true) => self.uses(row, self.right),
            (false, false) => Ok(0),
        }
    }

    fn uses(
        &self,
        row: &CallRow<'_>,
        factor: (&'static str, TensorView<'_>),
    ) -> Result<i128, RuleError> {
        let elements = factor.1.elements();
        let uses = if elements == 0 {
            0
        } else {
            self.products / elements
        };
        times(
            row.nonzeros(factor.0, row.seen_after(factor.0))?,
            row.note("uses", uses),
        )
    }
}

/// A product that may be large.
pub(crate) fn times(a: i128, b: i128) -> Result<i128, RuleError> {
    a.checked_mul(b)
        .ok_or_else(|| RuleError::Unsuited("the count overflows".to_owned()))
}
