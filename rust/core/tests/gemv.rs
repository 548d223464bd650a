#![allow(clippy::unwrap_used)]

mod common;

use common::{backends, bits, cast, normal};
use half::{bf16, f16};
use halfbyte_core::ops::gemv::Gemv;
use halfbyte_core::ops::gemv_4bit::GemvShape;
use halfbyte_core::tensor::Float;
use halfbyte_core::{Backend, CpuBackend, TensorMut, TensorRef, parallel};

fn gemv<T: Float>(backend: &CpuBackend, x: &[T], weight: &[T], shape: GemvShape) -> Vec<T> {
    let mut out = vec![T::from_f32(f32::NAN); shape.m * shape.n];
    let (x, weight, target) =
        (TensorRef::from_slice(x), TensorRef::from_slice(weight), TensorMut::from_slice(&mut out));
    backend.gemv(Gemv::new(x, weight, target, shape).unwrap()).unwrap();
    out
}

fn assert_close<T: Float>(shape: GemvShape, rounding: f64) {
    let GemvShape { m, n, k } = shape;
    let (x, weight): (Vec<T>, Vec<T>) = (cast(&normal(m * k, 3)), cast(&normal(n * k, 5)));
    for backend in backends() {
        for (i, value) in gemv(&backend, &x, &weight, shape).into_iter().enumerate() {
            let pairs = x[i / n * k..].iter().zip(&weight[i % n * k..][..k]);
            let products: Vec<f64> = pairs.map(|(x, w)| f64::from(x.to_f32()) * f64::from(w.to_f32())).collect();
            let (sum, bound) = (products.iter().sum::<f64>(), products.iter().map(|p| p.abs()).sum::<f64>());
            let error = (f64::from(value.to_f32()) - sum).abs();
            assert!(error <= 1e-6 * bound + rounding * sum.abs() + 1e-7, "{error} {bound}");
        }
    }
}

#[test]
fn sums_agree_with_fp64() {
    for (n, k) in [(1, 1), (5, 15), (7, 16), (3, 33), (300, 576), (9, 1000)] {
        for m in [1, 2, 3, 4, 5, 8, 9] {
            let shape = GemvShape { m, n, k };
            assert_close::<f32>(shape, 0.0);
            assert_close::<f16>(shape, 1e-3);
            assert_close::<bf16>(shape, 4e-3);
        }
    }
}

#[test]
fn a_row_depends_on_itself_only() {
    let (n, k) = (400, 333);
    let (x, weight) = (normal(9 * k, 3), normal(n * k, 5));
    for backend in backends() {
        let together = gemv(&backend, &x, &weight, GemvShape { m: 9, n, k });
        for (row, x) in x.chunks(k).enumerate() {
            parallel::set_num_threads(1 + row % 3);
            let alone = gemv(&backend, x, &weight, GemvShape { m: 1, n, k });
            assert_eq!(bits(&alone), bits(&together[row * n..][..n]));
        }
        parallel::set_num_threads(0);
    }
}

#[test]
fn bf16_converts_as_the_half_crate_does() {
    for bits in 0..=u16::MAX {
        let (own, other) = (Float::to_f32(bf16::from_bits(bits)), bf16::from_bits(bits).to_f32());
        assert!(own.to_bits() == other.to_bits() || own.is_nan() && other.is_nan(), "{bits:#x}");
    }
    let edges = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
    for bits in (0..=u32::from(u16::MAX)).flat_map(|high| edges.map(|low| high << 16 | low)) {
        let value = f32::from_bits(bits);
        assert_eq!(<bf16 as Float>::from_f32(value).to_bits(), bf16::from_f32(value).to_bits(), "{bits:#x}");
    }
}
