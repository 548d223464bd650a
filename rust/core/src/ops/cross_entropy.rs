//! `cross_entropy`: losses of rows of logits, whose gradients take the logits' place.
//!
//! ```text
//! logsumexp = log(sum of exp(x))                       fp32
//! loss      = logsumexp - x[label]                     0 for a masked row
//! x         = (exp(x - logsumexp) - (1 at the label)) / divisor    rounded to x's dtype; zeros for a masked row
//! ```

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
    /// f32 `[1]`; if there is one, the gradient of the losses' sum over it replaces the logits
    pub divisor: Option<TensorRef<'a>>,
    pub vocab: usize,
}

impl<'a> CrossEntropy<'a> {
    pub fn new(
        logits: TensorMut<'a>,
        labels: TensorRef<'a>,
        losses: TensorMut<'a>,
        divisor: Option<TensorRef<'a>>,
        vocab: usize,
    ) -> Result<Self> {
        let (rows, device) = (labels.numel(), logits.device());
        arg(OP, "logits", logits.as_ref()).float()?;
        arg(OP, "labels", labels).dtype(DType::I32)?.on(device, "logits")?;
        arg(OP, "losses", losses.as_ref()).dtype(DType::F32)?.numel(rows, "one a row")?.on(device, "logits")?;
        if let Some(divisor) = divisor {
            arg(OP, "divisor", divisor).dtype(DType::F32)?.numel(1, "a scalar")?.on(device, "logits")?;
        }
        let whole_rows = rows == 0 && logits.numel() == 0 || rows > 0 && logits.numel().is_multiple_of(rows);
        let fits = vocab > 0 && i32::try_from(vocab).is_ok();
        if !whole_rows || !fits || logits.numel() < rows * vocab {
            let expected = "as long as a row of logits at most, and 1 to 2^31 - 1";
            let got = format!("{vocab} for {} logits in {rows} rows", logits.numel());
            return Err(Error::Argument { op: OP, name: "vocab", expected, got });
        }
        Ok(Self { logits, labels, losses, divisor, vocab })
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
        let rows = self.logits.into_slice::<T>().chunks_mut(stride).zip(labels).zip(self.losses.into_slice());
        parallel::for_each(rows, labels.len(), |((x, &label), loss)| {
            let x = &mut x[..vocab];
            let label = usize::try_from(label).ok().filter(|&label| label < vocab);
            *loss = label.map_or(0.0, |label| logsumexp(x) - x[label].to_f32());
            match (divisor, label) {
                (Some(divisor), Some(label)) => differentiate(x, label, divisor),
                (Some(_), None) => x.fill(T::from_f32(0.0)),
                (None, _) => {}
            }
        });
    }
}

fn logsumexp<T: Float>(x: &[T]) -> f32 {
    let largest = x.iter().fold(f32::MIN, |largest, x| largest.max(x.to_f32()));
    let sum: f64 = x.iter().map(|x| f64::from((x.to_f32() - largest).exp())).sum();
    largest + sum.ln() as f32
}

fn differentiate<T: Float>(x: &mut [T], label: usize, divisor: f32) {
    let logsumexp = logsumexp(x);
    for (i, x) in x.iter_mut().enumerate() {
        let hit = if i == label { 1.0 } else { 0.0 };
        *x = T::from_f32(((x.to_f32() - logsumexp).exp() - hit) / divisor);
    }
}
