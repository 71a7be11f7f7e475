//! Reading the body of a request: its type, its size, the time it takes, and what it says.

use std::sync::Arc;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body_util::BodyExt;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::cut;
use crate::error::ApiError;
use crate::gateway::{BODY_UNIT, Gateway};

/// Bytes that are read and thrown away of a body that is too large, so that its client comes to read
/// the answer instead of a reset.
const DISCARD_LIMIT: usize = 64 << 20;

/// A body with its share of the memory for bodies.
pub(super) struct HeldBody {
    pub(super) bytes: Bytes,
    _share: Option<OwnedSemaphorePermit>,
}

pub(super) fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let found = headers
        .get(header::CONTENT_TYPE)
        .map(|value| cut(&String::from_utf8_lossy(value.as_bytes())));
    // Strict also because a web page can send other types to this machine without asking, but not this one.
    let is_json = found.as_deref().is_some_and(|found| {
        let essence = found.split(';').next().unwrap_or_default().trim();
        essence.eq_ignore_ascii_case("application/json")
    });
    if is_json {
        Ok(())
    } else {
        Err(ApiError::unsupported_media_type(found.as_deref()))
    }
}

/// Reads a body within its limits of size, time and memory.
pub(super) async fn read_body(
    gateway: &Gateway,
    headers: &HeaderMap,
    body: Body,
) -> Result<HeldBody, ApiError> {
    let limit = gateway.inner.options.request_body_limit;
    let time_limit = gateway.inner.options.body_read_limit;
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let reading = collect(body, announced, limit, Arc::clone(&gateway.inner.body_memory));
    match timeout(time_limit, reading).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::too_slow(time_limit)),
    }
}

async fn collect(
    mut body: Body,
    announced: Option<usize>,
    limit: usize,
    memory: Arc<Semaphore>,
) -> Result<HeldBody, ApiError> {
    let mut bytes = BytesMut::new();
    let mut share: Option<OwnedSemaphorePermit> = None;
    let mut discarded = 0;
    let mut too_large = announced.is_some_and(|announced| announced > limit);
    if too_large && announced.is_some_and(|announced| announced > DISCARD_LIMIT) {
        return Err(ApiError::too_large(limit));
    }
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::bad_request("the request body broke off"))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if too_large || bytes.len() + data.len() > limit {
            too_large = true;
            bytes = BytesMut::new();
            share = None;
            discarded += data.len();
            if discarded > DISCARD_LIMIT {
                break;
            }
        } else {
            let held = share.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
            let missing = (bytes.len() + data.len())
                .div_ceil(BODY_UNIT)
                .saturating_sub(held);
            let more = u32::try_from(missing)
                .ok()
                .and_then(|missing| Arc::clone(&memory).try_acquire_many_owned(missing).ok())
                .ok_or_else(|| ApiError::unavailable("too many large requests are in flight; try again"))?;
            match &mut share {
                Some(share) => share.merge(more),
                None => share = Some(more),
            }
            bytes.extend_from_slice(&data);
        }
    }
    if too_large {
        Err(ApiError::too_large(limit))
    } else {
        Ok(HeldBody {
            bytes: bytes.freeze(),
            _share: share,
        })
    }
}

pub(super) fn parse(body: &[u8]) -> Result<Value, ApiError> {
    let text = std::str::from_utf8(body).map_err(|error| {
        ApiError::bad_request(format!(
            "the request body is not valid UTF-8 at byte {}; encode it as UTF-8",
            error.valid_up_to()
        ))
        .with_code("invalid_utf8")
    })?;
    serde_json::from_str(text).map_err(|error| {
        ApiError::bad_request(format!("the request body is not valid JSON: {error}"))
            .with_code("invalid_json")
    })
}
