//! Fractions of integers, exact, where what does not fit is told.

use std::cmp::Ordering;
use std::fmt;

/// A fraction in lowest terms with a positive denominator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rational {
    numerator: i128,
    denominator: i128,
}

const fn gcd(mut a: u128, mut b: u128) -> u128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

impl Rational {
    pub(crate) const ZERO: Self = Self::integer(0);

    pub(crate) const fn integer(value: i128) -> Self {
        Self {
            numerator: value,
            denominator: 1,
        }
    }

    /// `None`: the denominator is zero, or the lowest terms do not fit.
    pub(crate) fn new(numerator: i128, denominator: i128) -> Option<Self> {
        if denominator == 0 {
            return None;
        }
        let (n, d) = (numerator.unsigned_abs(), denominator.unsigned_abs());
        let common = gcd(n, d);
        let n = i128::try_from(n / common).ok()?;
        let denominator_is_negative = denominator < 0;
        Some(Self {
            numerator: if (numerator < 0) == denominator_is_negative {
                n
            } else {
                -n
            },
            denominator: i128::try_from(d / common).ok()?,
        })
    }

    /// A finite float, where a fraction of 128 bits is as exact.
    pub(crate) fn from_float(value: f64) -> Option<Self> {
        if !value.is_finite() {
            return None;
        }
        let bits = value.to_bits();
        let exponent = i32::try_from((bits >> 52) & 0x7ff).ok()?;
        let fraction = i128::from(bits & ((1 << 52) - 1));
        let (mantissa, exponent) = if exponent == 0 {
            (fraction, -1074)
        } else {
            (fraction | 1 << 52, exponent - 1075)
        };
        let mantissa = if bits >> 63 == 1 { -mantissa } else { mantissa };
        if mantissa == 0 {
            return Some(Self::ZERO);
        }
        // The lowest bits may be zeros.
        let zeros = i32::try_from(mantissa.trailing_zeros()).ok()?;
        let (mantissa, exponent) = (mantissa >> zeros, exponent + zeros);
        let power = 1i128.checked_shl(exponent.unsigned_abs()).filter(|p| *p > 0)?;
        if exponent >= 0 {
            mantissa.checked_mul(power).map(Self::integer)
        } else {
            Self::new(mantissa, power)
        }
    }

    /// The number, where it is a whole one.
    pub(crate) const fn whole(self) -> Option<i128> {
        if self.denominator == 1 {
            Some(self.numerator)
        } else {
            None
        }
    }

    pub(crate) const fn is_negative(self) -> bool {
        self.numerator < 0
    }

    pub(crate) const fn is_zero(self) -> bool {
        self.numerator == 0
    }

    pub(crate) const fn floor(self) -> i128 {
        self.numerator.div_euclid(self.denominator)
    }

    pub(crate) fn ceil(self) -> Option<i128> {
        let floor = self.floor();
        if self.denominator == 1 {
            Some(floor)
        } else {
            floor.checked_add(1)
        }
    }

    pub(crate) fn negate(self) -> Option<Self> {
        Some(Self {
            numerator: self.numerator.checked_neg()?,
            ..self
        })
    }

    pub(crate) fn add(self, other: Self) -> Option<Self> {
        let common = i128::try_from(gcd(
            self.denominator.unsigned_abs(),
            other.denominator.unsigned_abs(),
        ))
        .ok()?;
        let (left, right) = (other.denominator / common, self.denominator / common);
        let sum = self
            .numerator
            .checked_mul(left)?
            .checked_add(other.numerator.checked_mul(right)?)?;
        Self::new(sum, self.denominator.checked_mul(left)?)
    }

    pub(crate) fn subtract(self, other: Self) -> Option<Self> {
        self.add(other.negate()?)
    }

    pub(crate) fn multiply(self, other: Self) -> Option<Self> {
        // Reduced crosswise first, so that what fits is found to fit.
        let a = Self::new(self.numerator, other.denominator)?;
        let b = Self::new(other.numerator, self.denominator)?;
        Self::new(
            a.numerator.checked_mul(b.numerator)?,
            a.denominator.checked_mul(b.denominator)?,
        )
    }

    /// `None` also for a division by zero, which the caller looks for.
    pub(crate) fn divide(self, other: Self) -> Option<Self> {
        self.multiply(Self::new(other.denominator, other.numerator)?)
    }

    pub(crate) fn power(self, exponent: i128) -> Option<Self> {
        let times = u32::try_from(exponent.unsigned_abs()).ok()?;
        let base = if exponent < 0 {
            Self::new(self.denominator, self.numerator)?
        } else {
            self
        };
        Some(Self {
            numerator: base.numerator.checked_pow(times)?,
            denominator: base.denominator.checked_pow(times)?,
        })
    }
}

impl PartialOrd for Rational {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Rational {
    /// Whole parts first, then what remains, turned upside down: nothing is multiplied, so nothing overflows.
    fn cmp(&self, other: &Self) -> Ordering {
        let (mut a, mut b) = (*self, *other);
        let mut turned = false;
        loop {
            let (left, right) = (a.floor(), b.floor());
            let rest = |f: Self| f.numerator.rem_euclid(f.denominator);
            let (left_rest, right_rest) = (rest(a), rest(b));
            let order = left.cmp(&right).then(match (left_rest, right_rest) {
                (0, 0) => Ordering::Equal,
                (0, _) => Ordering::Less,
                (_, 0) => Ordering::Greater,
                _ => Ordering::Equal,
            });
            if order != Ordering::Equal || left_rest == 0 {
                return if turned { order.reverse() } else { order };
            }
            (a, b) = (
                Self {
                    numerator: a.denominator,
                    denominator: left_rest,
                },
                Self {
                    numerator: b.denominator,
                    denominator: right_rest,
                },
            );
            turned = !turned;
        }
    }
}

impl fmt::Display for Rational {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.denominator == 1 {
            self.numerator.fmt(f)
        } else {
            write!(f, "{}/{}", self.numerator, self.denominator)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ratio(n: i128, d: i128) -> Rational {
        Rational::new(n, d).unwrap()
    }

    #[test]
    fn fractions_are_kept_in_lowest_terms() {
        assert_eq!(ratio(6, -4), ratio(-3, 2));
        assert_eq!(ratio(6, -4).to_string(), "-3/2");
        assert_eq!((ratio(-3, 2).floor(), ratio(-3, 2).ceil()), (-2, Some(-1)));
        assert_eq!(ratio(1, 3).add(ratio(1, 6)), Some(ratio(1, 2)));
        assert_eq!(ratio(2, 3).power(-2), Some(ratio(9, 4)));
        assert_eq!(Rational::new(1, 0), None);
        assert_eq!(ratio(1, 2).divide(Rational::ZERO), None);
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let most = Rational::integer(i128::MAX);
        assert_eq!(most.add(Rational::integer(1)), None);
        assert_eq!(most.multiply(Rational::integer(2)), None);
        assert_eq!(most.divide(most), Some(Rational::integer(1)));
        assert_eq!(Rational::new(i128::MIN, 1), None);
        assert_eq!(Rational::integer(i128::MIN).negate(), None);
        assert_eq!(Rational::integer(2).power(127), None);
    }

    #[test]
    fn floats_are_taken_exactly() {
        assert_eq!(Rational::from_float(0.75), Some(ratio(3, 4)));
        assert_eq!(Rational::from_float(-2.0), Some(ratio(-2, 1)));
        assert_eq!(Rational::from_float(0.0), Some(Rational::ZERO));
        assert_eq!(Rational::from_float(1e300), None);
        assert_eq!(Rational::from_float(1e-300), None);
        assert_eq!(Rational::from_float(f64::NAN), None);
    }

    proptest! {
        #[test]
        fn fractions_obey_the_laws(a in -1000i128..1000, b in 1i128..1000, c in -1000i128..1000, d in 1i128..1000) {
            let (x, y) = (ratio(a, b), ratio(c, d));
            prop_assert_eq!(x.add(y), Rational::new(a * d + c * b, b * d));
            prop_assert_eq!(x.subtract(y).unwrap().add(y), Some(x));
            prop_assert_eq!(x.multiply(y), Rational::new(a * c, b * d));
            if c != 0 {
                prop_assert_eq!(x.divide(y).unwrap().multiply(y), Some(x));
            }
            prop_assert_eq!(x.cmp(&y), (a * d).cmp(&(c * b)));
            prop_assert!(x.floor() * b <= a && a < (x.floor() + 1) * b);
        }

        #[test]
        fn nothing_panics(a in any::<i128>(), b in any::<i128>(), c in any::<i128>(), d in any::<i128>(), e in any::<i128>()) {
            let fractions = [Rational::new(a, b), Rational::new(c, d), Some(Rational::integer(e)), Some(Rational::integer(a))];
            for x in fractions.into_iter().flatten() {
                let _ = (x.negate(), x.ceil(), x.power(3), x.power(-2), x.to_string());
                for y in fractions.into_iter().flatten() {
                    let _ = (x.add(y), x.subtract(y), x.multiply(y), x.divide(y));
                    prop_assert_eq!(x.cmp(&y), y.cmp(&x).reverse());
                }
            }
        }

        #[test]
        fn floats_come_back(value in -1e15f64..1e15) {
            if let Some(exact) = Rational::from_float(value) {
                #[expect(clippy::cast_precision_loss, reason = "both terms are exact")]
                let back = exact.numerator as f64 / exact.denominator as f64;
                prop_assert_eq!(back, value);
            }
        }
    }
}
