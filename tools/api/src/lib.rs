//! Requests and replies of the admin socket.
