//! `cross_entropy`: losses of rows of logits, whose gradients take the logits' place.
//!
//! ```text
//! logsumexp = log(sum of exp(x))                       fp32
//! loss      = logsumexp - x[label]                     0 for a masked row
//! x         = (exp(x - logsumexp) - (1 at the label)) / divisor    rounded to x's dtype; zeros for a masked row
//! ```
//!
//! `cross_entropy_backward` is the last line alone, for some columns of the vocabulary at a time.

use crate::check::arg;
use crate::error::{Error, Result};
use crate::parallel;
use crate::tensor::{DType, Float, TensorMut, TensorRef, with_float};

const OP: &str = "cross_entropy";

#[derive(Debug)]
#[non_exhaustive]
pub struct CrossEntropy<'a> {
    /// f32, f16 or bf16 `[rows, stride]`, of which the first `vocab` columns count
    pub logits: TensorMut<'a>,
    /// i32 `[rows]`; a row whose label is no column is masked
    pub labels: TensorRef<'a>,
    /// f32 `[rows]`
    pub losses: TensorMut<'a>,
    /// f32 `[rows]`, of rows that are not masked
    pub logsumexps: TensorMut<'a>,
    /// f32 `[1]`; if there is one, the gradient of the losses' sum over it replaces the logits
    pub divisor: Option<TensorRef<'a>>,
    pub vocab: usize,
}

impl<'a> CrossEntropy<'a> {
    pub fn new(
        logits: TensorMut<'a>,
        labels: TensorRef<'a>,
        losses: TensorMut<'a>,
        logsumexps: TensorMut<'a>,
        divisor: Option<TensorRef<'a>>,
        vocab: usize,
    ) -> Result<Self> {
        let (rows, device) = (labels.numel(), logits.device());
        arg(OP, "logits", logits.as_ref()).float()?;
        arg(OP, "labels", labels).dtype(DType::I32)?.on(device, "logits")?;
        arg(OP, "losses", losses.as_ref()).dtype(DType::F32)?.numel(rows, "one a row")?.on(device, "logits")?;
        let totals = arg(OP, "logsumexps", logsumexps.as_ref()).dtype(DType::F32)?;
        totals.numel(rows, "one a row")?.on(device, "logits")?;
        if let Some(divisor) = divisor {
            arg(OP, "divisor", divisor).dtype(DType::F32)?.numel(1, "a scalar")?.on(device, "logits")?;
        }
        check_columns(OP, "vocab", vocab, &logits, rows)?;
        Ok(Self { logits, labels, losses, logsumexps, divisor, vocab })
    }

    /// Elements from one row of logits to the next.
    pub fn stride(&self) -> usize {
        self.logits.numel().checked_div(self.labels.numel()).unwrap_or(self.vocab)
    }

    pub(crate) fn run_on_cpu(self) {
        with_float!(self.logits.dtype(), T => self.run::<T>())
    }

    fn run<T: Float>(self) {
        let (stride, vocab) = (self.stride(), self.vocab);
        let divisor = self.divisor.map(|divisor| divisor.as_slice::<f32>()[0]);
        let labels: &[i32] = self.labels.as_slice();
        let rows = self.logits.into_slice::<T>().chunks_mut(stride).zip(labels);
        let outs = self.losses.into_slice().iter_mut().zip(self.logsumexps.into_slice());
        parallel::for_each(rows.zip(outs), labels.len(), |((x, &label), (loss, total))| {
            let x = &mut x[..vocab];
            let label = usize::try_from(label).ok().filter(|&label| label < vocab);
            *total = label.map_or(0.0, |_| logsumexp(x));
            *loss = label.map_or(0.0, |label| *total - x[label].to_f32());
            match (divisor, label) {
                (Some(divisor), Some(label)) => differentiate(x, Some(label), *total, divisor),
                (Some(_), None) => x.fill(T::from_f32(0.0)),
                (None, _) => {}
            }
        });
    }
}

const BACKWARD: &str = "cross_entropy_backward";

#[derive(Debug)]
#[non_exhaustive]
pub struct CrossEntropyBackward<'a> {
    /// f32, f16 or bf16 `[rows, stride]`, of which the first `width` columns count: those of the vocabulary from
    /// `first` on; replaced by their gradient
    pub logits: TensorMut<'a>,
    /// i32 `[rows]`; a row with a negative label is masked
    pub labels: TensorRef<'a>,
    /// f32 `[rows]`
    pub logsumexps: TensorRef<'a>,
    /// f32 `[1]`
    pub divisor: TensorRef<'a>,
    pub first: usize,
    pub width: usize,
}

impl<'a> CrossEntropyBackward<'a> {
    pub fn new(
        logits: TensorMut<'a>,
        labels: TensorRef<'a>,
        logsumexps: TensorRef<'a>,
        divisor: TensorRef<'a>,
        first: usize,
        width: usize,
    ) -> Result<Self> {
        let (rows, device) = (labels.numel(), logits.device());
        arg(BACKWARD, "logits", logits.as_ref()).float()?;
        arg(BACKWARD, "labels", labels).dtype(DType::I32)?.on(device, "logits")?;
        let totals = arg(BACKWARD, "logsumexps", logsumexps).dtype(DType::F32)?;
        totals.numel(rows, "one a row")?.on(device, "logits")?;
        arg(BACKWARD, "divisor", divisor).dtype(DType::F32)?.numel(1, "a scalar")?.on(device, "logits")?;
        check_columns(BACKWARD, "width", width, &logits, rows)?;
        if i32::try_from(first + width).is_err() {
            let (expected, got) = ("columns that end below 2^31", format!("{width} from {first} on"));
            return Err(Error::Argument { op: BACKWARD, name: "first", expected, got });
        }
        Ok(Self { logits, labels, logsumexps, divisor, first, width })
    }

    /// Elements from one row of logits to the next.
    pub fn stride(&self) -> usize {
        self.logits.numel().checked_div(self.labels.numel()).unwrap_or(self.width)
    }

    pub(crate) fn run_on_cpu(self) {
        with_float!(self.logits.dtype(), T => self.run::<T>())
    }

    fn run<T: Float>(self) {
        let (stride, first, width) = (self.stride(), self.first, self.width);
        let (divisor, labels): (f32, &[i32]) = (self.divisor.as_slice()[0], self.labels.as_slice());
        let rows = self.logits.into_slice::<T>().chunks_mut(stride).zip(labels).zip(self.logsumexps.as_slice());
        parallel::for_each(rows, labels.len(), |((x, &label), &total)| match usize::try_from(label) {
            Ok(label) => differentiate(&mut x[..width], label.checked_sub(first), total, divisor),
            Err(_) => x[..width].fill(T::from_f32(0.0)),
        });
    }
}

/// Rows of logits have `columns`.
fn check_columns(
    op: &'static str,
    name: &'static str,
    columns: usize,
    logits: &TensorMut<'_>,
    rows: usize,
) -> Result<()> {
    let numel = logits.numel();
    let whole_rows = rows == 0 || numel.is_multiple_of(rows);
    let fits = columns > 0 && i32::try_from(columns).is_ok();
    if !whole_rows || !fits || numel < rows * columns {
        let expected = "as long as a row of logits at most, and 1 to 2^31 - 1";
        let got = format!("{columns} for {numel} logits in {rows} rows");
        return Err(Error::Argument { op, name, expected, got });
    }
    Ok(())
}

fn logsumexp<T: Float>(x: &[T]) -> f32 {
    let largest = x.iter().fold(f32::MIN, |largest, x| largest.max(x.to_f32()));
    let sum: f64 = x.iter().map(|x| f64::from((x.to_f32() - largest).exp())).sum();
    largest + sum.ln() as f32
}

fn differentiate<T: Float>(x: &mut [T], label: Option<usize>, logsumexp: f32, divisor: f32) {
    for (i, x) in x.iter_mut().enumerate() {
        let hit = if Some(i) == label { 1.0 } else { 0.0 };
        *x = T::from_f32(((x.to_f32() - logsumexp).exp() - hit) / divisor);
    }
}
