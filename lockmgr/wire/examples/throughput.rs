//! Calls per second over mutual TLS on loopback, client and server in one process.
//!
//! `cargo run --release -p wire --example throughput -- [seconds] [in flight] [body bytes]`
#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a measurement prints and reads the clock"
)]

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::{BoxFuture, join_all};
use tokio::net::TcpListener;
use uuid::Uuid;
use wire::{
    Class, Connection, Endpoint, Handler, Identity, Local, Peer, Refusal, RefuseAll, Server, authority,
    connect_tls,
};

struct Echo;

impl Handler for Echo {
    fn handle(
        &self,
        _from: Peer,
        _conn: Connection,
        _service: u16,
        body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        Box::pin(async { Ok(body) })
    }
}

fn endpoint(ca: &authority::Issued, cluster: Uuid, node: u16) -> Result<Endpoint, Box<dyn Error>> {
    let issued = authority::issue(ca, node)?;
    let identity = Identity::from_pem(&issued.cert_pem, &issued.key_pem, &ca.cert_pem)?;
    Ok(Endpoint::new(Local { cluster, node, name: format!("n{node}") }, identity)?)
}

fn argument(position: usize, default: u64) -> u64 {
    std::env::args().nth(position).and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn Error>> {
    let seconds = argument(1, 3);
    let in_flight = argument(2, 64);
    let body = Bytes::from(vec![7; usize::try_from(argument(3, 64))?]);
    let (ca, cluster) = (authority::create_ca("throughput")?, Uuid::new_v4());
    let server = Server::serve_tls(
        TcpListener::bind("127.0.0.1:0").await?,
        endpoint(&ca, cluster, 2)?,
        Arc::new(Echo),
    );
    let address = server.address().ok_or("no address")?.to_string();
    let endpoint = endpoint(&ca, cluster, 1)?;
    let connection = connect_tls(&address, &endpoint, 2, Class::Control, Arc::new(RefuseAll)).await?;

    let (calls, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let begun = Instant::now();
    let callers = (0..in_flight).map(|_| {
        let (connection, body) = (connection.clone(), body.clone());
        let (calls, over) = (Arc::clone(&calls), Arc::clone(&over));
        tokio::spawn(async move {
            while !over.load(Ordering::Relaxed) {
                connection.call(1, body.clone()).await?;
                calls.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<(), wire::WireError>(())
        })
    });
    let callers: Vec<_> = callers.collect();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    over.store(true, Ordering::Relaxed);
    for caller in join_all(callers).await {
        caller??;
    }
    let rate = calls.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64();
    println!("{rate:.0} calls/s, {in_flight} in flight, {} byte bodies, mutual TLS", body.len());
    connection.close();
    connection.closed().await;
    server.shutdown().await;
    Ok(())
}
